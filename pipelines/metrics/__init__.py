"""Image scores: reading images, feature extractors, references and the figures themselves."""
