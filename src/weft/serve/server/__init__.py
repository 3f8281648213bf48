"""The server: OpenAI and KServe v2 around engines, in one process."""
