"""Bytes: moment by moment for one layout (`moments.py`), and in closed form for many (`footprint.py`)."""
