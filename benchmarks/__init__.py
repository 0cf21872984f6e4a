"""Measurements, each a command of the README or of docs/."""
