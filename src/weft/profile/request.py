"""Requests for a trace: a file in the folder of a run, which its rank 0 looks for once a step. Torch-free."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from weft.config.layout import Layout
from weft.whole import write_whole

FOLDER, FILE = "profile", "request.json"
MANIFEST = "profile.json"
"""Of a capture, written last, by rank 0: a folder with it is whole."""
WARM = 3
"""Steps after which a run shows what it is: the first ones compile, allocate and connect."""
MOST_RANKS = 8


@dataclass(frozen=True)
class Request:
    """Which steps to take, and on which ranks.

    Attributes:
        first: number of the first step; 0: the next one, once the run is warm.
        count: of steps.
        ranks: on which a trace is taken; the others go on as ever.
    """

    first: int
    count: int
    ranks: tuple[int, ...]

    def write(self, run: Path) -> None:
        """Leave it in a run's folder; at once or not at all."""
        folder = run / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / FILE, json.dumps(asdict(self)))

    @staticmethod
    def waiting(run: Path) -> bool:
        return os.path.exists(run / FOLDER / FILE)

    @staticmethod
    def take(run: Path) -> Request:
        """Read it, and take it away: it is done once.

        Raises:
            ValueError: it is damaged.
        """
        file = run / FOLDER / FILE
        text = file.read_text(encoding="utf-8")
        file.unlink()
        try:
            values = json.loads(text)
            return Request(int(values["first"]), int(values["count"]), tuple(map(int, values["ranks"])))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            raise ValueError(f"{file} is no request for a trace: {text[:60]!r}") from None


def leave(request: Request | None, run: Path) -> None:
    """What a run that begins now is asked for; without a request, what an earlier one was asked for is gone."""
    if request is not None:
        request.write(run)
    else:
        (run / FOLDER / FILE).unlink(missing_ok=True)


def parse_steps(text: str) -> tuple[int, int]:
    """`10:13`: steps 10, 11 and 12; `3`: three steps, once the run is warm → first (0: warm), count.

    Raises:
        ValueError: it is neither.
    """
    if re.fullmatch(r"[1-9]\d*", text):
        return 0, int(text)
    if (match := re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)) and int(match[1]) < int(match[2]):
        return int(match[1]), int(match[2]) - int(match[1])
    raise ValueError(f"--profile {text}: write a number of steps, or 10:13 for steps 10, 11 and 12")


def default_ranks(layout: Layout) -> tuple[int, ...]:
    """All of a few; of many, those of the first replica, and of these no more than MOST_RANKS, evenly chosen."""
    if layout.world <= MOST_RANKS:
        return tuple(range(layout.world))
    inside = layout.cp * layout.tp  # the axes that lie inside of dp and fsdp: parallel/mesh.py
    replica = [stage * (layout.world // layout.pp) + rank for stage in range(layout.pp) for rank in range(inside)]
    if len(replica) <= MOST_RANKS:
        return tuple(replica)
    return tuple(replica[index * len(replica) // MOST_RANKS] for index in range(MOST_RANKS))


def parse_ranks(text: str | None, layout: Layout) -> tuple[int, ...]:
    """`0,1,4`, `all`, or None for `default_ranks`.

    Raises:
        ValueError: one of them is none of the layout's.
    """
    if text is None:
        return default_ranks(layout)
    if text == "all":
        return tuple(range(layout.world))
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(f"ranks {text}: write numbers with commas between, 0,1,4, or all")
    ranks = tuple(sorted({int(word) for word in text.split(",")}))
    if ranks[-1] >= layout.world:
        raise ValueError(f"ranks {text}: layout {layout} has ranks 0 to {layout.world - 1}")
    return ranks
