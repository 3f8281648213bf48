"""One reference run of each model, kept for all tests of a session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from harness import Compared, trace

from weft.config.layout import Layout
from weft.config.tree import Config
from weft.data.indexed import IndexedWriter
from weft.verify.layout import LayoutReport, compare


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first: at the end of a list whoever is through early takes of the others' only what is short."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """Compares a layout, over 2 steps (the second has what the first left), with one process in the same precision."""
    references: dict[str, tuple[Config, Path]] = {}

    def run(config: Config) -> LayoutReport:
        single = config.model_copy(update={"layout": Layout(precision=config.layout.precision)})
        key = single.model_dump_json()
        if key not in references:
            references[key] = (single, trace(single, tmp_path_factory.mktemp("reference") / "trace"))
        return compare(references[key], (config, trace(config, tmp_path_factory.mktemp("cut") / "trace")))

    return run


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token file with documents much shorter than a sequence."""
    prefix = tmp_path_factory.mktemp("data") / "documents"
    numbers = np.random.default_rng(0)
    with IndexedWriter(str(prefix), np.uint16) as writer:
        for _ in range(400):
            writer.add(numbers.integers(0, 67, numbers.integers(2, 15)).astype(np.uint16))
    return prefix
