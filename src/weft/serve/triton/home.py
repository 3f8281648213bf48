"""Where Triton is: the one that pip brings, kept in a folder of its own, or one that is installed. Torch-free.

`nvidia-pytriton` has the server and its Python backend inside. It needs numpy 1, where the rest of weft's environment has
numpy 2. So both go into an environment that only Triton's processes see, and that looks through to this one for all else.
The stub, the process that runs the backend, must lie beside it, and find this very Python's library.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from weft.serve.triton.repository import CODE

PACKAGES = ("nvidia-pytriton==0.7.0", "numpy==1.26.4")
SERVER, LIBRARIES, STUB = "pytriton/tritonserver", "nvidia_pytriton.libs", "triton_python_backend_stub"

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
SITE = f"lib/python{VERSION}/site-packages"

ONNXRUNTIME, PYTORCH = "onnxruntime", "pytorch"
STAND_INS = {ONNXRUNTIME: "weft.serve.triton.onnx", PYTORCH: "weft.serve.triton.aoti"}
"""Backends of NVIDIA's that weft has in Python, and where: see `graph.py`."""

SEE_THROUGH = """\
import contextlib, locale, os, site, sys

with contextlib.suppress(locale.Error):
    locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
sys.path += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
site.addsitedir(os.fsdecode({outer!r}))
"""
"""A module that a .pth file imports: behind its own packages come PYTHONPATH, which the stub's Python leaves out, and the
environment around. That Python has no locale either: text files would be ASCII, paths are, whatever is done."""


@dataclass(frozen=True)
class Home:
    """An installed Triton.

    Attributes:
        binary: the server.
        backends: the folder of its backends.
        env: variables that its processes need beside this process's own.
    """

    binary: Path
    backends: Path
    env: dict[str, str]


def find_home(folder: Path | None = None) -> Home:
    """Triton in `folder`, as NVIDIA's containers have it in /opt/tritonserver; None: pip's, installed once and kept.

    Raises:
        ValueError: it is not there, or cannot be installed.
    """
    if folder is not None:
        binary, backends = folder / "bin" / "tritonserver", folder / "backends"
        if not binary.is_file() or not backends.is_dir():
            raise ValueError(f"{folder} holds no Triton: it needs bin/tritonserver and backends/")
        return Home(binary, backends, {"PATH": _in_front("PATH", Path(sys.executable).parent)})
    libpython = find_libpython()
    kept = kept_folder()
    if not kept.is_dir():
        install(kept)
    add_stand_ins(kept / "backends")
    site = kept / SITE
    return Home(
        binary=site / SERVER / "bin" / "tritonserver",
        backends=kept / "backends",
        env={
            "PATH": _in_front("PATH", kept / "bin"),  # the stub's environment is that of the first python3 there
            # without these the stub runs another Python's library, or finds none and waits for ever
            "LD_LIBRARY_PATH": _in_front("LD_LIBRARY_PATH", libpython, site / LIBRARIES),
        },
    )


def kept_folder() -> Path:
    """Where it is kept: in the user's cache, one for each environment and set of packages."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    what = (sys.version, sys.prefix, sys.base_prefix, *PACKAGES, SEE_THROUGH)
    return cache / "weft" / f"triton-{hashlib.sha256(repr(what).encode()).hexdigest()[:12]}"


def install(kept: Path) -> None:
    """Make an environment, let pip fetch 73 MB into it, and put the stub of this Python beside the backend.

    Raises:
        ValueError: pip failed, or there is no stub for this Python.
    """
    print(f"weft: installing {' and '.join(PACKAGES)} into {kept}, once (73 MB)", file=sys.stderr, flush=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{kept.name}-", dir=kept.parent))
    try:
        _run(sys.executable, "-m", "venv", "--without-pip", str(unfinished))
        site = unfinished / SITE
        # no dependencies: they are for pytriton's Python API, which nobody here uses
        _run(sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--disable-pip-version-check",
             "--target", str(site), *PACKAGES)  # fmt: skip
        see_through(site, sysconfig.get_path("platlib"))
        stub = site / SERVER / "python_backend_stubs" / VERSION / STUB
        if not stub.is_file():
            raise ValueError(f"{PACKAGES[0]} has no stub for Python {VERSION}: use Python 3.11, 3.12 or 3.13")
        shutil.copytree(site / SERVER / "backends", unfinished / "backends")
        shutil.copy2(stub, unfinished / "backends" / "python")
        if not kept.is_dir():  # another process may have been faster
            os.rename(unfinished, kept)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def see_through(site: Path, outer: str) -> None:
    """Let the environment of the packages in `site` have those in `outer` as well."""
    (site / "weft_see_through.py").write_text(SEE_THROUGH.format(outer=os.fsencode(outer)), encoding="utf-8")
    (site / "weft-see-through.pth").write_text("import weft_see_through\n", encoding="utf-8")


def add_stand_ins(backends: Path) -> None:
    """Give Triton's Python backend these names as well."""
    for name, module in STAND_INS.items():
        (backends / name).mkdir(exist_ok=True)
        (backends / name / CODE).write_text(f"from {module} import TritonPythonModel\n", encoding="utf-8")


def find_libpython() -> Path:
    """The folder of this Python's own shared library.

    Raises:
        ValueError: it was built without one, or the package that has it is not installed.
    """
    folder, name = sysconfig.get_config_var("LIBDIR") or "/", sysconfig.get_config_var("INSTSONAME") or ""
    for place in (Path(folder), Path(folder) / (sysconfig.get_config_var("MULTIARCH") or "")):
        if name.startswith("libpython") and ".so" in name and (place / name).is_file():
            return place
    raise ValueError(
        f"Triton's Python backend needs the shared library of {sys.executable}, and there is none in {folder}: "
        f"install libpython{VERSION}, or a Python built with --enable-shared"
    )


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(
            f"Triton could not be installed: {' '.join(command)} ended with\n{done.stderr.strip()[-2000:]}\n"
            "The package is for Linux on x86-64 with glibc 2.35 or newer; elsewhere use NVIDIA's container"
        )


def _in_front(variable: str, *folders: Path) -> str:
    return ":".join(filter(None, (*map(str, folders), os.environ.get(variable))))
