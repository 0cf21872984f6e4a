"""Quantisers, transforms, timestep tables, packing, and the layers made of them."""
