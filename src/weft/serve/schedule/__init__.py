"""Which tokens of which sequences a step computes, whose turn it is, and who holds which block. Torch-free."""
