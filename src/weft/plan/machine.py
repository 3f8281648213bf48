"""A cluster: its GPU, its links, how many. Published ones are presets/clusters/*.toml. Torch-free."""

from __future__ import annotations

import difflib
import functools
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from weft.config.load import explain, read_toml
from weft.plan.time.curves import Curves
from weft.plan.work import Machine

FOLDER = Path(__file__).parents[1] / "presets" / "clusters"


MOST = 1e5
"""Of any rate or size, in its own unit: more is a mistaken one, as bytes for GiB."""
ODD = 300
"""Times as much, or as little, as the preset that a file is based on: one unit for another is 1,000 times."""


class Cluster(BaseModel):
    """GPUs of one kind. Rates are in one direction and of one GPU; efficiencies are shares of the peak."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = ""
    gpus: int = Field(8, ge=1)
    peak_tflops: float = Field(gt=0, le=MOST, description="dense, 16 bit")
    peak_8bit_tflops: float = Field(gt=0, le=MOST)
    gemm_efficiency: float = Field(gt=0, le=1, description="of the best matrix product, 16 bit")
    gemm_8bit_efficiency: float = Field(gt=0, le=1)
    attention_efficiency: float = Field(gt=0, le=1, description="of fused attention, of the 16-bit peak")
    sms: int = Field(ge=1, description="tiles that are worked on at once")
    memory_gib: float = Field(gt=0, le=MOST)
    memory_gb_per_s: float = Field(gt=0, le=MOST)
    nvlink_gb_per_s: float = Field(gt=0, le=MOST)
    nvlink_domain: int = Field(ge=1, description="GPUs that are joined without the network")
    mesh: bool = Field(False, description="each pair of a node's GPUs has links of its own, and there is no switch")
    halves_gb_per_s: float = Field(0, ge=0, description="between a node's two CPUs, where messages of GPUs pass there")
    network_gb_per_s: float = Field(gt=0, le=MOST)
    network_wait_us: float = Field(0, ge=0, description="of a collective that is waited for, a node; EFA: 350")
    adapter_gb_per_s: float = Field(
        0, ge=0, description="where a group uses one adapter of a node and no more, of that"
    )
    per_node: int = Field(8, ge=1)
    host_gb_per_s: float = Field(25, gt=0, description="between a GPU and its CPU's memory")
    host_memory_gib: float = Field(256, ge=0, description="of the CPU, for each GPU; 0: there is no other memory")
    host_memory_gb_per_s: float = Field(50, gt=0, description="of that memory, for each GPU")
    precision: Literal["bf16", "fp16"] = Field("bf16", description="of 16 bits, that its matrix units multiply")
    generation: int = Field(2, ge=0, le=4, description="0 Volta, 1 Ampere, 2 Hopper, 3 Blackwell; 4 CDNA 3")
    device: Literal["cuda", "cpu"] = Field("cuda", description="what computes, in PyTorch's words")
    curves: Curves | None = Field(None, description="measured here, by `weft plan calibrate`")

    @property
    def memory(self) -> float:
        """Bytes."""
        return self.memory_gib * 2**30

    @property
    def runs_on(self) -> Literal["cuda", "cpu"]:
        return self.curves.device if self.curves else self.device

    @property
    def unit(self) -> str:
        """What one of them is called: several processes share a CPU."""
        return "process" if self.runs_on == "cpu" else "GPU"

    @property
    def units(self) -> str:
        return "processes" if self.runs_on == "cpu" else "GPUs"

    def peak(self, *, in_8_bits: bool) -> float:
        """FLOP/s of one GPU, that an MFU is a share of: what is told of it, or, where runs have been faster than that was
        measured to be, as they may on a CPU, what follows from them."""
        told = self.peak_8bit_tflops if in_8_bits else self.peak_tflops
        return max(told * 1e12, self.curves.peak if self.curves else 0.0)

    def machine(self) -> Machine:
        """One GPU as numbers."""
        return Machine(
            peak=self.peak_tflops * 1e12,
            peak8=self.peak_8bit_tflops * 1e12,
            gemm=self.gemm_efficiency,
            gemm8=self.gemm_8bit_efficiency,
            attention=self.attention_efficiency,
            sms=self.sms,
            hbm=self.memory_gb_per_s * 1e9,
            memory=self.memory,
            nvlink=self.nvlink_gb_per_s * 1e9,
            domain=self.nvlink_domain,
            mesh=float(self.mesh),
            halves=self.halves_gb_per_s * 1e9,
            network=self.network_gb_per_s * 1e9,
            wait=self.network_wait_us * 1e-6,
            adapter=self.adapter_gb_per_s * 1e9,
            generation=self.generation,
            host=self.host_gb_per_s * 1e9,
            host_memory=self.host_memory_gib * 2**30,
            host_hbm=self.host_memory_gb_per_s * 1e9,
        )


@functools.cache
def cluster_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def read_cluster(name: str, gpus: int | None = None) -> Cluster:
    """A preset by name, or a file; `h100x1024` is a preset and a number.

    A file may name a preset as `base` and say only what differs.

    Raises:
        ValueError: there is no such cluster, or a field is wrong; names it.
    """
    path = Path(name)
    if path.suffix == ".toml":
        values = _load(path)
        base = values.pop("base", None)
        theirs = _load(_preset(base)) if base else {}
        _check_units(path, values, theirs)
        values = {**theirs, **values}
    else:
        preset, _, count = name.rpartition("x")
        preset += "x" * (f"{preset}x" in cluster_names())  # mi300x64 is mi300xx64 too
        if not (preset in cluster_names() and count.isdigit()):
            preset, count = name, ""
        values = _load(_preset(preset))
        gpus = gpus or (int(count) if count else None)
    if gpus is not None:
        values["gpus"] = gpus
    try:
        return Cluster.model_validate(values)
    except ValidationError as error:
        missing = [
            str(found["loc"][0]) for found in error.errors() if found["type"] == "missing" and not found["loc"][1:]
        ]
        unknown = [str(found["loc"][-1]) for found in error.errors() if found["type"] == "extra_forbidden"]
        if missing:
            misspelt = f" (it says {', '.join(unknown)}, which weft does not know)" if unknown else ""
            raise ValueError(
                f"cluster {name} does not say {', '.join(missing)}{misspelt}: add what is missing, or name a "
                'preset that has it, as in base = "h100"'
            ) from None
        raise ValueError(f"cluster {name}: {explain(error, Cluster)}") from None


def _check_units(path: Path, values: dict[str, Any], preset: dict[str, Any]) -> None:
    """Links are left alone: between a slow one and a fast one there may be as much."""
    for name in ("peak_tflops", "peak_8bit_tflops", "memory_gib", "memory_gb_per_s"):
        told, usual = values.get(name), preset.get(name)
        if isinstance(told, int | float) and usual and told > 0 and not 1 / ODD < told / usual < ODD:
            raise ValueError(
                f"cluster {path}: {name} = {told:g}, and its base has {usual:g}: see that the unit is right"
            )


def _preset(name: object) -> Path:
    if not isinstance(name, str):
        raise ValueError(f'base = {name!r} is no name of a preset: write it as in base = "h100"')
    if name not in cluster_names():
        kind = re.sub(r"x\d+$", "", name)
        begun = [known for known in cluster_names() if known.startswith(kind)]
        near = begun or difflib.get_close_matches(kind, cluster_names(), n=1, cutoff=0.6)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        if kind.endswith(".toml"):
            raise ValueError(f"--cluster {name}: a file says itself how many GPUs there are: write gpus into {kind}")
        raise ValueError(
            f"there is no cluster {name!r}: {hint}There are {', '.join(cluster_names())}, each with a number of GPUs as "
            "in h100x64; a file of your own ends with .toml"
        )
    return FOLDER / f"{name}.toml"


def _load(path: Path) -> dict:
    if not path.exists():
        raise ValueError(
            f"there is no cluster file {path}: `weft plan calibrate --out {path}` measures this machine and writes one; or "
            "name a preset and a number of GPUs, as h100x8"
        )
    return read_toml(path)
