"""KServe v2, the protocol of Triton Inference Server, over HTTP and gRPC."""
