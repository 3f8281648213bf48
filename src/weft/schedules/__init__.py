"""Pipeline schedules as data. Torch-free, and knows nothing else of weft."""
