"""The engine's own kernels for a CPU, in C++: compiled when they are first wanted, in some five seconds, and kept.

They lie in `weft/` of the user's cache (`$XDG_CACHE_HOME`, or `~/.cache`), by what they were made of: source, compiler, and
the CPU's instructions. Without a C++ compiler there are none, which is said, and torch's own do.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger("weft.serve")

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17", "-march=native", "-fopenmp", "-shared", "-fPIC")
COMPILERS = ("g++", "clang++", "c++")
POINTER, WHOLE = ctypes.c_void_p, ctypes.c_int64
ARGUMENTS = {
    "rows": (*4 * (POINTER,), *3 * (WHOLE,), ctypes.c_int),
    "attention": (*4 * (POINTER,), WHOLE, *3 * (POINTER,), WHOLE, ctypes.c_float, ctypes.c_int),
    "blocks": 3 * (POINTER,),
}
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def rows_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., I], weight [O, I] → [..., O], all of them float32 or all bfloat16, on the CPU; `library` is there."""
    run, x, (outputs, inputs) = kernel("rows", weight.dtype), x.contiguous(), weight.shape
    y = x.new_empty((*x.shape[:-1], outputs))
    run(
        x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(), x.numel() // inputs,
        inputs, outputs, torch.get_num_threads(),
    )  # fmt: skip
    return y


def attends(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `paged_attention` can be had of these."""
    return q.device.type == "cpu" and q.dtype == keys.dtype == values.dtype and q.dtype in DTYPES and bool(library())


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, blocks: Tensor | range, mask: Tensor, scale: float | None
) -> Tensor:
    """Each of R tokens q [1, H, R, E] at its own sequence's keys and values: [1, H, R, V]. Of the CPU; see `attends`.

    Args:
        keys, values: of all, [blocks, block, K, E] and [blocks, block, K, V].
        blocks: of each sequence, [R, M]; a range of them where R is 1.
        mask: 0 from the first to the last place that a token sees, -inf before and behind: [R, 1, 1, M · block].
        scale: of the scores; None: 1/√E.
    """
    q, tables = q.transpose(1, 2).contiguous(), None if isinstance(blocks, range) else blocks.contiguous()
    _, count, heads, dim = q.shape
    y = q.new_empty(1, count, heads, values.shape[-1])
    each = len(blocks) if isinstance(blocks, range) else blocks.shape[1]
    sizes = (WHOLE * 6)(count, heads, keys.shape[2], dim, values.shape[-1], keys.shape[1])
    kernel("attention", q.dtype)(
        q.data_ptr(), keys.data_ptr(), values.data_ptr(), None if tables is None else tables.data_ptr(),
        blocks.start if isinstance(blocks, range) else 0, mask.contiguous().data_ptr(), y.data_ptr(), sizes, each,
        dim**-0.5 if scale is None else scale, torch.get_num_threads(),
    )  # fmt: skip
    return y.transpose(1, 2)


@cache
def kernel(name: str, dtype: torch.dtype) -> Callable[..., None]:
    kernels = library()
    assert kernels is not None
    run: Callable[..., None] = getattr(kernels, f"{DTYPES[dtype]}_{name}")
    return run


@cache
def library() -> ctypes.CDLL | None:
    """The kernels; None: they cannot be made here."""
    try:
        kernels = ctypes.CDLL(str(built()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # no compiler, a bad one, no place for it
        log.warning("the engine's kernels for a CPU could not be made (%s): torch's are slower", error)
        return None
    for name, arguments in ARGUMENTS.items():
        for dtype in DTYPES.values():
            run = kernels[f"{dtype}_{name}"]
            run.argtypes, run.restype = arguments, None
            setattr(kernels, f"{dtype}_{name}", run)
    return kernels


def built() -> Path:
    """The shared library, compiled unless it is there already.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be.
    """
    compiler = find_compiler()
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")
    about = subprocess.run(
        [compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, timeout=60, check=True
    ).stdout
    sources = sorted(SOURCES.glob("*.[ch]pp"))
    made_of = (*(source.read_bytes() for source in sources), about, repr(FLAGS).encode())
    digest = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weft"
    file = folder / f"kernels-{digest}.so"
    if not file.is_file():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:  # another process may be at it too
            part = Path(made) / file.name
            units = (str(source) for source in sources if source.suffix == ".cpp")
            command = [compiler, *FLAGS, *units, "-o", str(part)]
            subprocess.run(command, capture_output=True, timeout=300, check=True)
            part.replace(file)
    return file


def find_compiler() -> str | None:
    """`$CXX`, or the first of the usual ones that is there."""
    return next((found for name in (os.environ.get("CXX"), *COMPILERS) if name and (found := shutil.which(name))), None)
