"""`weft serve-triton`: NVIDIA's Triton Inference Server on an exported repository."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from weft.serve.triton.process import Addresses
    from weft.serve.triton.serve import TritonOptions


def serve_triton(
    repository: Path = typer.Argument(help="A folder that `weft export triton` wrote."),
    host: str = typer.Option("127.0.0.1", help="Address to listen on; 0.0.0.0: all, and anybody can ask."),
    http_port: int = typer.Option(8000, help="Port of HTTP; 0 takes a free one, here and below."),
    grpc_port: int = typer.Option(8001, help="Port of gRPC."),
    metrics_port: int = typer.Option(8002, help="Port of Prometheus metrics."),
    triton: Path | None = typer.Option(
        None,
        help="Folder of an installed Triton, /opt/tritonserver in NVIDIA's containers.",
        show_default="the one that pip brings, installed once into your cache",
    ),
    start_seconds: float = typer.Option(600.0, help="How long the models may take to load."),
    drain_seconds: int = typer.Option(30, help="How long running requests may take to finish when it is stopped."),
) -> None:
    """Start Triton, wait until every model has really answered, and start it again should it, or a model, die.

    Ctrl-C or SIGTERM lets running requests finish, and ends it.
    """
    from weft.serve.triton.serve import TritonOptions

    start(repository, TritonOptions(host, http_port, grpc_port, metrics_port, triton, start_seconds, drain_seconds))


def start(repository: Path, options: TritonOptions) -> None:
    """Serve a repository until told to end; say where, once its models have answered."""
    from weft.serve.triton.repository import read_repository
    from weft.serve.triton.serve import serve_triton as serve

    models = read_repository(repository)
    names, ours = [model.name for model in models], [model.name for model in models if model.ours]

    def tell(addresses: Addresses) -> None:
        print(f"ready: HTTP {addresses.url}, gRPC {addresses.host}:{addresses.grpc}, ", end="")
        print(f"metrics http://{addresses.host}:{addresses.metrics}/metrics; models: {', '.join(names)}")
        if ours:  # others take other inputs, which the page in their folder tells
            body = """'{"text_input": "Once", "max_tokens": 20}'"""
            print(f"try: curl {addresses.url}/v2/models/{ours[0]}/generate -d {body}")
        print("Ctrl-C ends it", flush=True)

    serve(repository, options, tell)
    print("stopped", flush=True)
