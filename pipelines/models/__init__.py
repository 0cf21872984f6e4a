"""Adapters: from the files people have to a denoiser, its conditioning and its sites."""
