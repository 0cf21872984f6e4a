"""One file per command: a function whose signature is the command's options, and EXAMPLE, which its help ends with."""
