"""One reference run of each model, kept for all tests of a session."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Compared, trace

from weft.config.layout import Layout
from weft.config.tree import Config
from weft.verify.layout import LayoutReport, compare


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """Compares a layout, over 3 steps, with one process in the same precision."""
    references: dict[str, tuple[Config, Path]] = {}

    def run(config: Config) -> LayoutReport:
        single = config.model_copy(update={"layout": Layout(precision=config.layout.precision)})
        key = single.model_dump_json()
        if key not in references:
            references[key] = (single, trace(single, tmp_path_factory.mktemp("reference") / "trace"))
        return compare(references[key], (config, trace(config, tmp_path_factory.mktemp("cut") / "trace")))

    return run
