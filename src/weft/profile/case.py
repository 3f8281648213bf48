"""What advice is made from. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from weft.config.load import make_config, merge
from weft.plan.memory.moments import Device, layout_memory
from weft.profile.load import Profile, Rank
from weft.profile.memory import Memory
from weft.units import percent

LEAST_TIME = 0.03
"""Of a step, below which a gain is not worth a line."""


@dataclass(frozen=True)
class Advice:
    """Attributes: share: of the step or of the device's memory, what it saves at most; by it they are ordered."""

    change: str
    gain: str
    evidence: str
    share: float


@dataclass(frozen=True)
class Case:
    """What advice is made from: the profile, its mean step, and the memory of the fullest rank."""

    profile: Profile
    memory: Memory | None
    memory_rank: Rank | None

    @property
    def step(self) -> float:
        return sum(self.profile.kinds.values())

    def share(self, kind: str) -> float:
        return self.profile.kinds[kind] / self.step

    def phase(self, name: str) -> float:
        """Share of the step."""
        return sum(seconds for (_, phase, _), seconds in self.profile.parts.items() if phase == name) / self.step

    @property
    def on_gpu(self) -> bool:
        return self.profile.ranks[0].trace.on_gpu

    def time(self, change: str, share: float, evidence: str) -> Iterator[Advice]:
        """An advice that saves time, if it is worth it."""
        if share >= LEAST_TIME:
            yield Advice(change, f"up to {percent(share)} of the step", evidence, share)

    def takes(self, **changes: Any) -> bool:
        """Whether weft does not refuse other settings; of a trace that tells none, nobody knows."""
        config = self.profile.config
        try:
            return config is None or bool(make_config(merge(config.model_dump(mode="json"), changes)))
        except ValueError:
            return False

    def saved(self, **changes: Any) -> int | None:
        """Bytes that the fullest rank takes less with other settings, by the planner; None where weft refuses them."""
        config, rank = self.profile.config, self.memory_rank
        assert config is not None
        assert rank is not None
        stage = rank.number // (config.layout.world // config.layout.pp)  # pp is outermost: parallel/mesh.py
        device: Device = "cuda" if self.on_gpu else "cpu"
        try:
            other = make_config(merge(config.model_dump(mode="json"), changes))
            before, after = (layout_memory(it, device)[stage].peak.tensors for it in (config, other))
        except ValueError:
            return None
        return before - after
