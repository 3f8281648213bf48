"""The schedules that weft knows, each with its source."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from weft.schedules.check import check
from weft.schedules.table import V_SCHEDULES, Op, Schedule


@lru_cache(maxsize=64)
def make_schedule(name: str, num_ranks: int, num_chunks: int, num_micro_batches: int) -> Schedule:
    """The table of a known schedule.

    Raises:
        ValueError: it cannot be made for so many processes, chunks and micro-batches.
    """
    if reason := refusal(name, num_ranks, num_chunks, num_micro_batches):
        raise ValueError(reason)
    orders = [ORDERS[name](rank, num_ranks, num_chunks, num_micro_batches) for rank in range(num_ranks)]
    return check(Schedule(name, tuple(tuple(order) for order in orders)))


def refusal(name: str, num_ranks: int, num_chunks: int, num_micro_batches: int) -> str | None:
    """Why a schedule cannot be made so; None where it can."""
    if name in V_SCHEDULES and num_chunks != 2:
        return f"{name} has 2 chunks on each process, not {num_chunks}"
    if name in SINGLE and num_chunks != 1:
        return f"{name} has 1 chunk on each process, not {num_chunks}; interleaved and bfs have more"
    if name == "interleaved" and num_micro_batches % num_ranks:
        rounds = f"rounds of {num_ranks} micro-batches, one for each process"
        return f"interleaved works in {rounds}: {num_micro_batches} are no whole rounds"
    least = LEAST.get(name, 0) * num_ranks
    if num_micro_batches < least:
        many = "as many" if LEAST[name] == 1 else "twice as many"
        return f"{name} needs {many} micro-batches as stages on its way, at least: there are {num_micro_batches}"
    return None


def forward_order(stages: list[int], num_ranks: int, num_micro_batches: int) -> list[Op]:
    """Rounds of as many micro-batches as there are processes, each through all of this one's stages."""
    rounds = [range(first, num_micro_batches)[:num_ranks] for first in range(0, num_micro_batches, num_ranks)]
    return [Op("F", stage, index) for indices in rounds for stage in stages for index in indices]


@lru_cache(maxsize=64)
def forward_only(place: tuple[int, ...], num_micro_batches: int) -> Schedule:
    """Evaluation: forwards alone, of any number of micro-batches. `place`: stage → process."""
    ranks = range(max(place) + 1)
    held = [[stage for stage, where in enumerate(place) if where == rank] for rank in ranks]
    orders = tuple(tuple(forward_order(stages, len(ranks), num_micro_batches)) for stages in held)
    return Schedule("of evaluation", orders)


def _alternate(forwards: list[Op], backwards: list[Op], ahead: int) -> list[Op]:
    """`ahead` forwards, then one of each in turn, then what is left."""
    ahead = min(ahead, len(forwards))
    steady = [op for pair in zip(forwards[ahead:], backwards, strict=False) for op in pair]
    return forwards[:ahead] + steady + backwards[len(forwards) - ahead :]


def _gpipe(rank: int, num_ranks: int, num_chunks: int, count: int) -> list[Op]:
    """Every forward, then every backward (Huang et al., 2019)."""
    return [Op(kind, rank, index) for kind in ("F", "B") for index in range(count)]


def _one_f_one_b(rank: int, num_ranks: int, num_chunks: int, count: int) -> list[Op]:
    """Just enough forwards to fill the pipeline, then one of each in turn (Narayanan et al., PipeDream, 2019)."""
    forwards, backwards = ([Op(kind, rank, index) for index in range(count)] for kind in ("F", "B"))
    return _alternate(forwards, backwards, num_ranks - rank - 1)


def _interleaved(rank: int, num_ranks: int, num_chunks: int, count: int) -> list[Op]:
    """1f1b over several chunks a process, in rounds: the pipeline fills num_chunks times as fast (Narayanan et al.,
    Efficient Large-Scale Language Model Training, 2021, 2.2)."""
    stages = [rank + num_ranks * chunk for chunk in range(num_chunks)]
    forwards = forward_order(stages, num_ranks, count)
    backwards = [op._replace(kind="B") for op in forward_order(stages[::-1], num_ranks, count)]
    return _alternate(forwards, backwards, 2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks)


def _bfs(rank: int, num_ranks: int, num_chunks: int, count: int) -> list[Op]:
    """Every micro-batch through one chunk, then through the next (Lamy-Poirier, Breadth-First Pipeline Parallelism,
    2022): weights that fsdp shards are gathered once for each chunk."""
    stages = [rank + num_ranks * chunk for chunk in range(num_chunks)]
    forwards = [Op("F", stage, index) for stage in stages for index in range(count)]
    return forwards + [Op("B", stage, index) for stage in stages[::-1] for index in range(count)]


def _zbh1(rank: int, num_ranks: int, num_chunks: int, count: int) -> list[Op]:
    """1f1b whose weights' backward is put off, later processes more, until nothing else can be done; activations stay
    those of 1f1b's first process (Qi et al., Zero Bubble Pipeline Parallelism, 2023, 3: ZB-H1)."""
    ahead, lag = min(num_ranks - rank, count), rank
    order = [Op("F", rank, index) for index in range(ahead)]
    for index in range(count):
        order.append(Op("B", rank, index))
        if index >= lag:
            order.append(Op("W", rank, index - lag))
        if index + ahead < count:
            order.append(Op("F", rank, index + ahead))
    return order + [Op("W", rank, index) for index in range(max(0, count - lag), count)]


class _V:
    """Writes the order of a process with two chunks, one on the way down and one on the way back."""

    def __init__(self, rank: int, num_ranks: int, count: int) -> None:
        self.stages, self.count = (rank, 2 * num_ranks - 1 - rank), count
        self.order: list[Op] = []
        self.next = dict.fromkeys((kind + str(chunk) for kind in "FB" for chunk in (0, 1)), 0)
        self.waiting: list[Op] = []  # weights put off

    def do(self, *what: str) -> None:
        """F0, B1: the next micro-batch of a kind and chunk, with B whole; I0: B of the input alone; W: the oldest put
        off; W0: the oldest put off of a chunk. What there is no more of is left out."""
        for word in what:
            if word[0] == "W":
                of = [op for op in self.waiting if word == "W" or op.stage == self.stages[int(word[1])]]
                if of:
                    self.waiting.remove(of[0])
                    self.order.append(of[0])
                continue
            chunk, key = int(word[1]), word.replace("I", "B")
            index = self.next[key]
            if index < self.count:
                self.next[key] += 1
                self.order.append(Op("F" if word[0] == "F" else "B", self.stages[chunk], index))
                if word[0] == "I":
                    self.waiting.append(Op("W", self.stages[chunk], index))

    def repeat(self, times: int, *what: str) -> None:
        for _ in range(times):
            self.do(*what)


def _zbv(rank: int, num_ranks: int, num_chunks: int, count: int) -> list[Op]:
    """Two chunks in a V, so that a micro-batch's forward ends where its backward begins; nobody waits between the first
    and the last operation where F, B and W take as long (Qi et al., Pipeline Parallelism with Controllable Memory,
    2024: V-ZB)."""
    v = _V(rank, num_ranks, count)
    v.repeat(2 * (num_ranks - rank) - 1, "F0")
    v.repeat(rank, "F1", "F0")
    v.repeat(num_ranks - rank, "F1", "I1", "W1")
    while v.next["F1"] < min(v.next["F0"], count) or v.next["F0"] < count:
        v.do("F0", "I0", "W0", "F1", "I1", "W1")
    v.repeat(rank, "I0", "I1")
    v.repeat(num_ranks - rank, "I0", "W0")
    v.repeat(count, "I1")
    v.repeat(count, "I0")
    v.repeat(2 * count, "W")
    return v.order


def _dualpipev(rank: int, num_ranks: int, num_chunks: int, count: int) -> list[Op]:
    """DeepSeek's DualPipe folded into a V (DeepSeek-V3, 2024; Qi's cut in half): forwards of one chunk beside backwards
    of the other. Weights are put off only where the pipeline fills and empties."""
    v, rest = _V(rank, num_ranks, count), num_ranks - rank - 1
    v.repeat(2 * rest, "F0")
    v.repeat(rank + 1, "F0", "F1")
    v.repeat(rest, "I1", "W", "F1")
    v.repeat(count - 2 * num_ranks + rank + 1, "F0", "B1", "F1", "B0")
    v.repeat(rest, "B1", "F1", "B0")
    whole = rank + 1
    for index in range(whole):  # of these the second half, in turns
        v.do("I1" if 2 * index + rank % 2 >= whole else "B1", "I0" if 2 * index + 1 - rank % 2 >= whole else "B0")
    v.repeat(rest, "W", "I0")
    v.repeat(2 * count, "W")
    return v.order


ORDERS: dict[str, Callable[[int, int, int, int], list[Op]]] = {
    "gpipe": _gpipe, "1f1b": _one_f_one_b, "interleaved": _interleaved, "bfs": _bfs,
    "zbh1": _zbh1, "zbv": _zbv, "dualpipev": _dualpipev,
}  # fmt: skip
SINGLE = ("gpipe", "1f1b", "zbh1")
SPLIT = ("zbh1", "zbv", "dualpipev")
LEAST = {"1f1b": 1, "zbh1": 1, "dualpipev": 2}
"""Micro-batches that a schedule needs, for each process."""
