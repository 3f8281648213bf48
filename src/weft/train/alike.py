"""What every process of a run must have been started with alike: settings, data and versions.

Over several machines each process reads its own copy of these. Nothing else would show that they differ: replicas with
other rates or other data run on, with a curve like any other, and are copies of one model no more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed import ProcessGroup

import weft
from weft.checkpoint.agreement import Agreement
from weft.config.tree import Config
from weft.data.loader import Loader


def check_alike(config: Config, loader: Loader, group: ProcessGroup | None) -> None:
    """Every process calls this.

    Raises:
        ValueError: on all of them: one was started with something else than rank 0.
    """
    found = dict(_settings(config.model_dump(mode="json")))
    found |= {"data": loader.fingerprint(), "weft": weft.__version__, "torch": torch.__version__}
    text, agreement = json.dumps(found), Agreement(group)
    if len(set(agreement.texts(hashlib.sha256(text.encode()).hexdigest()))) == 1:
        return
    first, *others = [json.loads(text) for text in agreement.texts(text)]
    for rank, other in enumerate(others, start=1):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"rank {rank} was started with {name} = {other.get(name)}, and rank 0 with {first.get(name)}: "
                    "give every machine the same settings, data files and versions"
                )


def _settings(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`optimizer.lr` and its value, and so on."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
