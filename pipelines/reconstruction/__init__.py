"""Calibration, blocks, and learned rounding and scales, block by block."""
