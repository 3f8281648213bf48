"""A schedule as a sheet: one line for each process, one cell for each time slot, empty where it waits.

A cell is stage, operation, micro-batch: `0F3`, `2B0`, `2W0`. Where a stage's W of a micro-batch is on the sheet, its B is
that of the input alone; `I` says the same. torch.distributed.pipelining writes its schedules in the same form.
"""

from __future__ import annotations

import csv
import re
from functools import lru_cache
from pathlib import Path
from typing import cast

from weft.schedules.check import check
from weft.schedules.table import Kind, Op, Schedule
from weft.schedules.timeline import Costs, timeline


@lru_cache(maxsize=8)
def read_sheet(path: str) -> Schedule:
    """The schedule of a CSV file, checked.

    Raises:
        ValueError: it is no schedule; the message names line and column where one cell is wrong.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = [line for line in csv.reader(file) if line]
    except OSError as error:
        raise ValueError(f"layout.schedule = {path}: {error.strerror}") from None
    orders, inputs = [], {}
    for row, line in enumerate(lines, start=1):
        order = []
        for column, cell in enumerate(line, start=1):
            if not cell.strip():
                continue
            match = re.fullmatch(r"(\d+)([FBIW])(\d+)", cell.strip())
            if match is None:
                raise ValueError(
                    f"{path}, line {row}, column {column}: {cell!r} is no operation. Write stage, F, B or W, and "
                    "micro-batch, as 0F3; leave a cell empty where the process waits"
                )
            kind = cast(Kind, "B" if match[2] == "I" else match[2])
            order.append(Op(kind, int(match[1]), int(match[3])))
            if match[2] == "I":
                inputs[order[-1]] = f"{path}, line {row}, column {column}: {cell.strip()}"
        orders.append(tuple(order))
    if not any(orders):
        raise ValueError(f"{path} holds no operation")
    schedule = Schedule(path, tuple(orders))
    for op, where in inputs.items():
        if op[1:] not in schedule.put_off:
            raise ValueError(f"{where} leaves out the weights, and no {op.stage}W{op.micro_batch} makes up for it")
    return check(schedule)


def write_sheet(schedule: Schedule, path: Path) -> None:
    """Every operation in the slot in which it begins if each takes one."""
    line = timeline(schedule, Costs(1, 1, 0) if not schedule.splits else Costs())
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        for row in line.spans:
            cells = [""] * int(line.length)
            for op, start, _ in row:
                kind = "I" if op.kind == "B" and op[1:] in schedule.put_off else op.kind
                cells[int(start)] = f"{op.stage}{kind}{op.micro_batch}"
            out.writerow(cells)
