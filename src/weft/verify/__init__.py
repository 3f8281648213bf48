"""Proofs: that a layout computes what one process computes, a resume what an unbroken run does, an export its source."""
