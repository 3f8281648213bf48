"""The pipeline's part of a layout: which schedule goes with which numbers. Torch-free."""

from __future__ import annotations

from weft.models.shape import Shape
from weft.schedules.orders import ORDERS, make_schedule, refusal
from weft.schedules.sheet import read_sheet
from weft.schedules.table import LOOPED, V_SCHEDULES, Schedule, placement


def check_pipeline(name: str, pp: int, vp: int) -> None:
    """Refuse what does not go together, whatever the model.

    Raises:
        ValueError: naming the setting to change.
    """
    if name not in ORDERS and not name.endswith(".csv"):
        raise ValueError(f"layout.schedule = {name} is none of {', '.join(ORDERS)}, and no .csv file")
    if pp == 1 and name != "1f1b":
        raise ValueError(f"layout.schedule = {name} orders a pipeline: set layout.pp above 1")
    if pp == 1 and vp > 1:
        raise ValueError(f"layout.vp = {vp} deals out the stages of a pipeline: set layout.pp above 1")
    if name in LOOPED and vp == 1:
        raise ValueError(f"layout.schedule = {name} is for several stages on each process: set layout.vp above 1")
    if name in V_SCHEDULES and vp > 2:
        raise ValueError(f"layout.vp = {vp}: {name} has 2 stages on each process. Leave layout.vp out")
    if name in ORDERS and name not in (*LOOPED, *V_SCHEDULES) and vp > 1:
        raise ValueError(
            f"layout.vp = {vp}: {name} has one stage on each process. Set layout.schedule to interleaved or bfs"
        )


def chunks_of(name: str, vp: int) -> int:
    """Stages of each process."""
    return 2 if name in V_SCHEDULES else vp


def placement_of(name: str, pp: int, vp: int) -> tuple[int, ...]:
    """Stage → the process on the pp axis that has it.

    Raises:
        ValueError: the schedule is a file that is not there, or is for another pp or vp.
    """
    if name in ORDERS:
        return placement(name, pp, chunks_of(name, vp))
    sheet = read_sheet(name)
    if (len(sheet.orders), sheet.num_stages) != (pp, pp * vp):
        raise ValueError(
            f"layout.schedule = {name} is for {len(sheet.orders)} processes and {sheet.num_stages} stages; "
            f"layout.pp = {pp} and layout.vp = {vp} make {pp * vp}"
        )
    return tuple(sheet.place[stage] for stage in range(pp * vp))


def check_count(name: str, pp: int, vp: int, num_micro_batches: int) -> None:
    """Refuse a number of micro-batches that the schedule is not for.

    Raises:
        ValueError: naming the settings to change.
    """
    if name in ORDERS:
        if reason := refusal(name, pp, chunks_of(name, vp), num_micro_batches):
            other = "gpipe" if chunks_of(name, vp) == 1 else "bfs"
            raise ValueError(
                f"{reason}, and layout.pp = {pp}. Change layout.micro_batch or train.global_batch, or use {other}"
            )
        return
    placement_of(name, pp, vp)
    there = read_sheet(name).num_micro_batches
    if there != num_micro_batches:
        raise ValueError(
            f"layout.schedule = {name} is for {there} micro-batches; layout.micro_batch and train.global_batch "
            f"make {num_micro_batches}"
        )


def table_of(name: str, pp: int, vp: int, num_micro_batches: int) -> Schedule:
    """The schedule of these micro-batches; one that `check_count` refuses is none."""
    check_count(name, pp, vp, num_micro_batches)
    return make_schedule(name, pp, chunks_of(name, vp), num_micro_batches) if name in ORDERS else read_sheet(name)


def default_count(name: str, pp: int, vp: int, sequences: int) -> int:
    """Micro-batches of so many sequences, if none was asked for: 2·pp, or the next number that divides and fits."""
    if name not in ORDERS:
        return min(read_sheet(name).num_micro_batches, sequences)
    counts = [
        n for n in range(1, sequences + 1) if sequences % n == 0 and not refusal(name, pp, chunks_of(name, vp), n)
    ]
    return next((n for n in counts if n >= 2 * pp), max(counts, default=sequences))


def balanced(shape: Shape, place: tuple[int, ...]) -> list[int]:
    """Blocks of each stage: one, and then block by block to the process that has least to do, there to its lightest stage.

    Work is counted in multiplications: the head is worth V·D of them a token, and the embedding, a lookup, none; blocks
    count as their mean.
    """
    work, sizes, loads = [1.0] * len(place), [1] * len(place), [0.0] * len(place)
    mean = sum(shape.block_matmul_params(block) for block in range(shape.num_layers)) / shape.num_layers
    work[-1] += shape.vocab * shape.hidden / mean
    for stage, rank in enumerate(place):
        loads[rank] += work[stage]
    for _ in range(shape.num_layers - len(place)):
        stage = min(range(len(place)), key=lambda stage: (loads[place[stage]], work[stage]))
        work[stage], sizes[stage], loads[place[stage]] = work[stage] + 1, sizes[stage] + 1, loads[place[stage]] + 1
    return sizes if len(place) > 1 else [shape.num_layers]
