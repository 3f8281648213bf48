"""Weights for other programs, written beside their name, proved, then renamed."""
