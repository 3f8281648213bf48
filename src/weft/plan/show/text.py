"""A cluster as text. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path

from weft.config.toml import toml_text
from weft.plan.machine import Cluster
from weft.whole import write_whole


def write_cluster(cluster: Cluster, path: Path) -> None:
    """As a cluster file, at once or not at all; `read_cluster` reads the same from it."""
    write_whole(path, toml_text(json.loads(cluster.model_dump_json(exclude_none=True))))
