"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from weft.whole import write_whole


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(file)
    for text in ("old", "new"):
        write_whole(link, text)
        assert link.is_symlink()
        assert file.read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    """As /dev/null is, which root would otherwise put a file in place of."""
    pipe, heard = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: heard.append(pipe.read_text()), daemon=True)
    reader.start()
    write_whole(pipe, "text")
    assert pipe.is_fifo()
    reader.join(10)
    assert heard == ["text"]
