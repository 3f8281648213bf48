"""weft: train, prove, deploy and serve neural networks too large for one GPU or one server."""

__version__ = "0.1.0"
