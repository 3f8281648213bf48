"""The engine's one kernel of its own, `rows.cpp`: compiled when it is first wanted, in a second, and kept.

It lies in `weft/` of the user's cache (`$XDG_CACHE_HOME`, or `~/.cache`), by what it was made of: source, compiler, and
the CPU's instructions. Without a C++ compiler there is none, and torch's products do.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("rows.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
COMPILERS = ("g++", "clang++", "c++")
ARGUMENTS = [*4 * [ctypes.c_void_p], *3 * [ctypes.c_int64], ctypes.c_int]


def rows_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., I], weight [O, I] → [..., O], all of them float32 or all bfloat16, on the CPU; `library` is there."""
    kernels = library()
    assert kernels is not None
    run = kernels.float32_rows if weight.dtype == torch.float32 else kernels.bfloat16_rows
    x, columns = x.contiguous(), x.shape[-1]
    y = x.new_empty(*x.shape[:-1], len(weight))
    added = None if bias is None else bias.data_ptr()
    sizes = (x.numel() // columns, columns, len(weight))
    run(x.data_ptr(), weight.data_ptr(), added, y.data_ptr(), *sizes, torch.get_num_threads())
    return y


@cache
def library() -> ctypes.CDLL | None:
    """The kernels; None: they cannot be made here."""
    try:
        kernels = ctypes.CDLL(str(built()))
    except (OSError, subprocess.SubprocessError):  # no compiler, one that fails, or no place to keep what it makes
        return None
    for run in (kernels.float32_rows, kernels.bfloat16_rows):
        run.argtypes, run.restype = ARGUMENTS, None
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
    digest = hashlib.sha256(b"\0".join((SOURCE.read_bytes(), about, repr(FLAGS).encode()))).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weft"
    file = folder / f"rows-{digest}.so"
    if not file.is_file():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:  # another process may be at it too
            part = Path(made) / file.name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(part)]
            subprocess.run(command, capture_output=True, timeout=300, check=True)
            part.replace(file)
    return file


def find_compiler() -> str | None:
    """`$CXX`, or the first of the usual ones that is there."""
    return next((found for name in (os.environ.get("CXX"), *COMPILERS) if name and (found := shutil.which(name))), None)
