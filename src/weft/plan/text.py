"""A cluster as text. Torch-free."""

from __future__ import annotations

import json
import os
from pathlib import Path

from weft.config.toml import toml_text
from weft.plan.machine import Cluster


def write_cluster(cluster: Cluster, path: Path) -> None:
    """As a cluster file, at once or not at all; `read_cluster` reads the same from it."""
    beside = path.with_suffix(".tmp")
    beside.write_text(toml_text(json.loads(cluster.model_dump_json(exclude_none=True))), encoding="utf-8")
    os.replace(beside, path)
