"""What a layout costs, worked out from its sizes: nothing is allocated, and torch is not imported."""
