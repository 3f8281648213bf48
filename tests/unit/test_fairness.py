"""Tenants take turns, and no one's prompts stop another's texts: the scheduler, with steps that take as long as said."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from weft.serve.config import EngineConfig
from weft.serve.requests.request import Request, Sampling
from weft.serve.requests.sequence import Sequence
from weft.serve.schedule.blocks import Blocks
from weft.serve.schedule.courtesy import KEPT_STEPS, LONGER
from weft.serve.schedule.scheduler import Scheduler
from weft.serve.schedule.steptimes import StepTimes
from weft.serve.schedule.turns import Turns

Cost = Callable[[int], float]


def cpu(tokens: int) -> float:
    """A core with a model of 0.1 billion weights, in ms: measured, see `benchmarks/serve_tenants.py`."""
    return 30 + 6 * tokens


def gpu(tokens: int) -> float:
    """Weights come once a step, and take as long as 150 tokens' products."""
    return max(6.0, 0.04 * tokens)


class Simulated:
    """An engine whose steps take as long as `cost` says, and whose model says 7."""

    def __init__(self, cost: Cost, **settings: int) -> None:
        config = EngineConfig(**{"block_tokens": 4, "max_sequences": 16, **settings})
        self.cost, self.blocks = cost, Blocks(2000, 4, keep=False)
        self.scheduler = Scheduler(self.blocks, config.on("cpu"))
        self.seconds: list[float] = []

    def add(self, id: str, tenant: str, prompt: int, tokens: int, priority: int = 0) -> Sequence:
        request = Request(id, [1] * prompt, Sampling(max_tokens=tokens), tenant=tenant, priority=priority)
        sequence = Sequence(request, 0, prompt + tokens)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[str]:
        """The requests that got a token."""
        told = []
        works = self.scheduler.schedule()
        for work in works:
            finish = None
            if work.is_last:
                told.append(work.sequence.request.id)
                finish, _, _ = work.sequence.push(7)
            self.scheduler.computed(work)
            if finish:
                self.scheduler.remove(work.sequence)
        self.seconds.append(self.cost(self.scheduler.planned))
        self.scheduler.courtesy.times.took(self.scheduler.planned, self.seconds[-1])
        return told

    def until(self, id: str) -> int:
        """Steps until this request has its next token."""
        steps = 1
        while id not in self.step():
            steps += 1
        return steps


def test_tenants_take_turns() -> None:
    engine = Simulated(cpu, max_sequences=1)
    for number in range(4):
        engine.add(f"a{number}", "a", 3, 1)
    engine.step()
    for number in range(2):
        engine.add(f"b{number}", "b", 3, 1)
    engine.add("c0", "c", 3, 1)
    engine.add("urgent", "a", 3, 1, priority=-1)
    order = [id for _ in range(7) for id in engine.step()]
    assert order == ["urgent", "b0", "c0", "a1", "b1", "a2", "a3"]


def test_who_comes_back_has_saved_no_turns_and_stops_nothing_that_runs() -> None:
    turns = Turns()
    for _ in range(5):
        turns.reach(turns.take("a"))
    first = turns.take("b")
    assert first == 4, "where the others are, behind the one that runs: that came before"
    assert [turns.take("b"), turns.take("a"), turns.take("a")] == [5, 5, 6]


@pytest.mark.parametrize("cost", [cpu, gpu])
def test_prompts_that_nobody_waits_for_hold_up_other_tenants_little(cost: Cost) -> None:
    """Ten clients a second hang up; two texts of another tenant go on meanwhile."""
    longer = {}
    for tenant in ("good", "bad"):
        engine = Simulated(cost)
        for name in ("one", "two"):
            engine.add(name, "good", 14, 300)
        for _ in range(20):
            engine.step()
        alone = engine.seconds[-1]
        for number in range(200):
            leaving = engine.add(f"left {number}", tenant, 400, 20)
            assert {"one", "two"} <= set(engine.step()), "every step brings both a token"
            engine.scheduler.remove(leaving)
        longer[tenant] = sum(engine.seconds[-150:]) / 150 / alone  # what was saved is used up by then
    assert longer["bad"] <= LONGER + 0.01
    assert longer["good"] > 2.5, "a tenant may hold itself up"


def test_a_step_takes_as_much_as_fits() -> None:
    """On a machine where a step's fixed part is as long as 150 tokens, about 200 fit; where it is as 5, one or two."""
    for cost, fewest, most in ((gpu, 150, 200), (cpu, 3, 4)):
        engine = Simulated(cost)
        engine.add("text", "a", 10, 400)
        engine.step()
        engine.add("prompt", "b", 7000 if cost is gpu else 500, 1)
        planned = []
        for _ in range(30):
            engine.step()
            planned.append(engine.scheduler.planned)
        assert fewest <= sorted(planned)[15] <= most


def test_who_asks_now_and_then_does_not_wait() -> None:
    """A share that was not used is not lost at once; and not kept for ever."""
    engine = Simulated(cpu)
    engine.add("text", "a", 10, 400)
    for number in range(10):
        for _ in range(KEPT_STEPS):
            engine.step()
        engine.add(str(number), "b", 14, 1)
        assert engine.until(str(number)) <= 1
    engine.add("long", "b", 200, 1)
    for _ in range(60):
        engine.step()
    planned = engine.scheduler.planned
    assert 2 <= planned <= 3
    assert engine.until("long") > 10


def test_a_long_prompt_ends_and_another_tenants_is_not_behind_it() -> None:
    engine = Simulated(cpu)
    engine.add("text", "a", 10, 10_000)
    engine.step()
    engine.add("long", "b", 600, 1)
    engine.step()
    engine.add("short", "c", 8, 1)
    assert engine.until("short") <= 8
    assert engine.until("long") <= 600
    assert engine.blocks.num_free == 2000 - len(engine.scheduler.running[0].blocks)


def test_nobody_to_hold_up_and_nothing_is_spared() -> None:
    engine = Simulated(cpu)
    engine.add("one", "a", 300, 5)
    engine.add("two", "b", 300, 5)
    engine.step()
    assert engine.scheduler.planned == 512, "prompts alone fill the step"
    alone = Simulated(cpu)
    for number in range(5):
        alone.add(str(number), "a", 300, 50)
    assert max(alone.until(str(number)) for number in range(5)) <= 3, "a tenant's own texts wait for its own prompts"


def test_invariant_steps_read_whole_strides() -> None:
    engine = Simulated(cpu, invariant=True)
    engine.add("text", "a", 10, 100)
    engine.step()
    engine.add("prompt", "b", 600, 1)
    assert engine.until("prompt") == 3


def test_random_tenants_come_and_go() -> None:
    """Whatever comes, everything ends, and every block is given back."""
    numbers = Random(5)
    engine = Simulated(cpu, max_sequences=4, step_tokens=32)
    engine.scheduler.blocks = engine.blocks = Blocks(40, 4)
    told, asked = set[str](), 0
    for _ in range(400):
        if asked < 120 and numbers.random() < 0.5:
            engine.add(str(asked), numbers.choice("abc"), numbers.randint(1, 60), numbers.randint(1, 30))
            asked += 1
        told |= set(engine.step())
    while engine.scheduler:
        told |= set(engine.step())
    assert len(told) == asked
    assert engine.blocks.num_free == 40
    assert engine.scheduler.preemptions > 0


def test_a_pause_of_the_machine_is_no_rule() -> None:
    times = StepTimes()
    assert times.most(2, 1.5) == 7, "nothing is known: it is tried"
    for tokens, seconds in ((2, 1.0), (2, 1.0), (2, 50.0), (4, 1.2), (6, 60.0), *5 * [(7, 1.7)], (100, 40.0)):
        times.took(tokens, seconds)
    assert times.most(2, 1.5) == 5, "between 2 and 7"
    assert times.most(2, 2.0) == 15, "the next size, which is not known"
    assert times.most(100, 1.5) == 255
    assert times.most(3, 1.0) == 4, "one at least"


def test_a_text_that_never_was_alone() -> None:
    times = StepTimes()
    times.took(10, gpu(10))
    assert times.most(1, 1.5) == 3, "what one token takes is not known: what is as large is tried"
    times.took(3, gpu(3))
    assert times.most(1, 1.5) == 31, "as long as ten, it seems"
