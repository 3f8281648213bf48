"""`weft serve-triton`: start Triton on a repository, wait until its models really answer, and keep it so. Torch-free."""

from __future__ import annotations

import importlib.util
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from weft.serve.triton.home import ONNXRUNTIME, PYTORCH, STAND_INS, find_home
from weft.serve.triton.process import Addresses, LostError, TritonProcess
from weft.serve.triton.repository import PACKAGE, Model, in_ascii, read_repository, without_aoti

PAUSES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each try to start it again; after the last it is given up."""


@dataclass(frozen=True)
class TritonOptions:
    """
    Attributes:
        http, grpc, metrics: ports; 0: any free one.
        triton: folder of an installed Triton (/opt/tritonserver in NVIDIA's containers); None: the one that pip brings.
        start_seconds: how long models may take to load.
        drain_seconds: how long what is running may take to finish when it is stopped.
    """

    host: str = "127.0.0.1"
    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002
    triton: Path | None = None
    start_seconds: float = 600.0
    drain_seconds: int = 30

    def __post_init__(self) -> None:
        for name in ("http", "grpc", "metrics"):
            if not 0 <= getattr(self, name) < 2**16:
                raise ValueError(
                    f"the port of {name} is {getattr(self, name)}; it must be from 0, which takes a free one, to 65535"
                )


def serve_triton(
    repository: Path, options: TritonOptions | None = None, ready: Callable[[Addresses], None] = lambda addresses: None
) -> None:
    """Serve until SIGTERM or Ctrl-C. A Triton that dies, or one of whose models does, is started again.

    Args:
        ready: told the addresses, once, when all models have answered.

    Raises:
        ValueError: the repository or Triton cannot be used, or Triton does not come up.
    """
    options = options or TritonOptions()
    models = read_repository(repository)
    if options.triton is None:
        check_backends(repository, models)
    addresses = Addresses(options.host, options.http, options.grpc, options.metrics).found()
    home = find_home(options.triton)

    def begin() -> TritonProcess:
        process = TritonProcess(home, served, models, addresses, options.drain_seconds)
        try:
            process.wait_until_ready(options.start_seconds, stop)
        except BaseException:
            process.kill()
            raise
        return process

    with stop_signal() as stop, TemporaryDirectory(prefix="weft-triton-") as scratch:
        empty = Path(scratch) / "models"
        empty.mkdir()
        served = in_ascii(repository.resolve(), Path(scratch) / "link")
        served = without_aoti(served, empty) if options.triton is None else served
        try:
            process = begin()
        except LostError as error:
            print(f"weft: {error}", file=sys.stderr, flush=True)
            process = begin_again(begin, stop)
        if not stop.is_set():
            ready(addresses)
        while wrong := process.watch(stop):
            print(f"weft: {wrong}; Triton is started again", file=sys.stderr, flush=True)
            process.kill()
            process = begin_again(begin, stop)
            if not stop.is_set():
                print("weft: Triton is back, and its models answer", file=sys.stderr, flush=True)
        process.end()


def begin_again(begin: Callable[[], TritonProcess], stop: threading.Event) -> TritonProcess:
    """Try until it comes up.

    Raises:
        ValueError: it never did.
    """
    for pause in PAUSES:
        stop.wait(pause)
        try:
            return begin()
        except ValueError as error:
            failure = error
            print(f"weft: {error}", file=sys.stderr, flush=True)
    raise ValueError(f"Triton does not come up again after {len(PAUSES)} tries; last: {failure}")


def check_backends(repository: Path, models: list[Model]) -> None:
    """
    Raises:
        ValueError: a model needs a backend that pip's Triton does not have.
    """
    for model in models:
        if model.backend == ONNXRUNTIME and importlib.util.find_spec("onnxruntime") is None:
            raise ValueError(f"{repository / model.name} needs ONNX Runtime: pip install 'weft[onnx]'")
        compiled = any((repository / model.name).glob(f"*/{PACKAGE}"))
        if model.backend not in ("python", *STAND_INS) or (model.backend == PYTORCH and not compiled):
            raise ValueError(
                f"{repository / model.name}: the Triton that pip brings has no backend {model.backend!r}, only python, "
                f"and weft's own {ONNXRUNTIME}, and {PYTORCH} for a {PACKAGE}: start it in NVIDIA's container, as "
                f"{model.name}/README.md says, or give --triton, the folder of an installed one"
            )


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """Set by SIGTERM or SIGINT; the second one ends as ever."""
    stop, signals = threading.Event(), (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in signals}

    def tell(number: int, frame: object) -> None:
        stop.set()
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in signals:
        signal.signal(number, tell)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
