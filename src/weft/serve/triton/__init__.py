"""Inside of NVIDIA's Triton Inference Server: the backend that its stub runs, and the server's start and watch."""
