"""Seconds: from datasheets (`step.py`), and from curves that were measured here (`counted.py`)."""
