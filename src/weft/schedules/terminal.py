"""A schedule drawn with letters: one line for each process, time to the right."""

from __future__ import annotations

from rich.text import Text

from weft.schedules.table import Op, Schedule
from weft.schedules.timeline import Timeline

BANDS = 4
"""Parts, one below the other, that a picture is folded into before its operations are made narrower."""
COLOURS = {"F": ("#2f5f9e", "#86aee0"), "B": ("#b3472f", "#e8a08f"), "W": ("#8a6412", "#e6c163")}
"""Of a process's first stage, and of the later ones."""
WAITING = "·"


def draw(schedule: Schedule, line: Timeline, width: int, colour: bool) -> list[Text]:
    """Lines of at most `width` columns.

    An operation is its letter and its micro-batch, as long as it takes; letters of a process's later stages are small.
    What is too wide goes on below, and if that becomes too much, operations are drawn shorter, down to a column.
    """
    names = [f"process {rank} " for rank in range(len(schedule.orders))]
    room = max(1, width - max(map(len, names)))
    label = 2 + len(str(schedule.num_micro_batches - 1))  # F, the number, and a gap
    columns = min(label, BANDS * room / line.length * line.briefest)
    scale = (int(columns) or columns) / line.briefest
    room -= (
        room % max(1, int(scale * line.briefest)) if room > label else 0
    )  # where all take as long, none is cut in two
    rows = [_row(schedule, line, rank, scale, colour) for rank in range(len(names))]
    lines = []
    for first in range(0, len(rows[0]), room):
        lines += [
            Text.assemble((name, "dim"), row[first : first + room]) for name, row in zip(names, rows, strict=True)
        ]
        lines.append(Text())
    return lines[:-1]


def _row(schedule: Schedule, line: Timeline, rank: int, scale: float, colour: bool) -> Text:
    text, first_stage = Text(), schedule.stages_of(rank)[0]
    for op, start, end in line.spans[rank]:
        left, right = int(start * scale + 0.5), int(end * scale + 0.5)
        text.append(WAITING * (left - len(text)), style="dim")
        text.append(*_cell(op, right - left, op.stage != first_stage, colour))
    return text.append(WAITING * (int(line.length * scale + 0.5) - len(text)), style="dim")


def _cell(op: Op, width: int, later: bool, colour: bool) -> tuple[str, str]:
    """What stands there, and its style."""
    letter = op.kind.lower() if later else op.kind
    text = f"{letter}{op.micro_batch}"
    text = text if len(text) < width else letter  # a number cut short would be another number
    text = text[:width] if colour or width <= len(text) else text + "─" * (width - len(text) - 1) + " "
    style = f"{'#101418' if later else '#ffffff'} on {COLOURS[op.kind][later]}" if colour else ""
    return (text.ljust(width - 1) + "▕" * (width > len(text))) if colour else text, style


def legend(schedule: Schedule, colour: bool) -> Text:
    """What the letters say."""
    kinds = {"F": "forward", "B": "backward", "W": "gradients of weights, put off"}
    text = Text()
    for kind, words in kinds.items():
        if kind != "W" or schedule.splits:
            text.append(f" {kind} ", style=f"#ffffff on {COLOURS[kind][0]}" if colour else "")
            text.append(f" {words}   ")
    if schedule.num_chunks > 1:
        text.append("small: later stages   ")
    return text.append(f"{WAITING * 2} waiting")
