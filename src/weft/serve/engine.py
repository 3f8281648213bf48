"""The engine: requests in, tokens of all of them out, a step at a time.

    engine = Engine.load(Path("runs/small"), EngineConfig())
    engine.add(Request("a", prompt=[1, 2, 3], sampling=Sampling(max_tokens=20, eos=engine.eos)))
    while engine.busy:
        for output in engine.step():
            ...

It belongs to one thread: `serve/loop.py` puts one around it. Requests may be added and cancelled between any two steps.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Self

from weft.checkpoint.sidecars import read_json
from weft.checkpoint.weights import load_decoder
from weft.models.decoder import Decoder
from weft.models.huggingface import shape_from_config
from weft.serve.about import About
from weft.serve.config import EngineConfig
from weft.serve.cut.ranks import Ranks, rank_device, start_ranks
from weft.serve.cut.share import check_cut, load_share
from weft.serve.folder import end_tokens, find_model, load_tokenizer
from weft.serve.requests.grammar import GrammarCompiler
from weft.serve.requests.request import Finish, Output, RefusedError, Request
from weft.serve.requests.sequence import Sequence as Completion
from weft.serve.requests.text import TextStream
from weft.serve.requests.tokens import Tokenizer
from weft.serve.schedule.blocks import Blocks
from weft.serve.schedule.scheduler import Scheduler, Work
from weft.serve.stats import Stats
from weft.serve.steps.computing import Computing
from weft.serve.steps.device import pick_device, pick_dtype, room_on
from weft.serve.steps.reading import Found
from weft.serve.steps.runner import Runner, num_blocks
from weft.serve.steps.speculate import make_drafter, window

WAYS_OUT = (
    "a smaller cache (--cache-tokens, --cache-dtype int8, --gpu-share), weights of fewer bits (--dtype), the model cut "
    "over several processes (--tp, --pp)"
)
"""Of a model that has no room."""


class Engine:
    """Continuous batching over one model.

    Attributes:
        max_context: tokens that a prompt and its completion may have together.
        eos: ids that end a text, by the model's own settings: for `Sampling.eos`.
        tokenizer: None: outputs have no text, and requests may have no stop texts.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer | None = None, config: EngineConfig | None = None,
        eos: tuple[int, ...] = (), ranks: Ranks | None = None, draft: Decoder | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            ranks: the processes that the model is cut over; `model` is the first one's share.
            draft: a smaller model that speculates; None: texts are looked up in themselves.

        Raises:
            ValueError: the cache has no room for a single block, or the draft model has another vocabulary.
        """
        self.config = config = (config or EngineConfig()).on(next(model.parameters()).device.type)
        self.tokenizer, self.eos, self.shape = tokenizer, eos, model.shape
        self.max_context = min(config.max_context or model.shape.max_seq, model.shape.max_seq)
        blocks = num_blocks(model, config, self.max_context)
        self.ranks = ranks
        blocks = ranks.least(blocks) if ranks is not None else blocks
        self.runner = Runner(model, blocks, config, ranks)
        self.drafter = make_drafter(model, draft, config, blocks)
        self.blocks = Blocks(blocks, config.block_tokens, keep=config.prefix_cache)
        self.scheduler = Scheduler(self.blocks, config, window(model, draft))
        self.computing = Computing(self.runner, self.scheduler, self.drafter)
        self.max_context = self.scheduler.longest(self.max_context)
        self._live: dict[str, list[Completion]] = {}
        self._told: list[Output] = []  # endings that came between two steps
        self._counts: Counter[str] = Counter()
        self._finished: Counter[Finish] = Counter()

    @classmethod
    def load(cls, path: Path, config: EngineConfig | None = None, draft: Path | None = None) -> Self:
        """An engine of a checkpoint (step-…), a run (its newest whole checkpoint), or a Hugging Face directory.

        Args:
            draft: where a smaller model that speculates is, likewise.

        Raises:
            ValueError: there is no model there, or no room for it, or the device or dtype cannot be had.
        """
        config = config or EngineConfig()
        folder, _ = find_model(path)
        device = pick_device(config.device)
        config = config.on(device.type)
        dtype = pick_dtype(config.dtype, device)
        tokenizer, eos = load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None, end_tokens(folder)
        with room_on(device, WAYS_OUT):
            small = load_decoder(find_model(draft)[0], device, dtype)[1] if draft is not None else None
            if config.world == 1:
                _, model = load_decoder(folder, device, dtype)
                return cls(model, tokenizer, config, eos, draft=small)
            check_cut(shape_from_config(read_json(folder / "config.json")), config.tp, config.pp)
            ranks = start_ranks(folder, config)
            try:
                model = load_share(folder, ranks, rank_device(config, 0), dtype)
                return cls(model, tokenizer, config, eos, ranks, small)
            except BaseException:
                ranks.kill()
                raise

    @property
    def about(self) -> About:
        """What never changes of it."""
        device = str(self.runner.device)
        return About(self.shape, self.max_context, self.eos, self.tokenizer is not None, device, self.config)

    def check(self, request: Request) -> None:
        """As About.check."""
        self.about.check(request)

    def add(self, request: Request) -> None:
        """Take in a request; its first outputs come from one of the next steps.

        Raises:
            ValueError: as `check`, or its id is in use.
            RefusedError: `max_waiting` are waiting already.
        """
        self.check(request)
        if request.id in self._live:
            raise ValueError(f"request id {request.id!r} is in use")
        if len(self.scheduler.waiting) + request.n > self.config.max_waiting + self.free_places:
            raise RefusedError(f"{len(self.scheduler.waiting)} completions are waiting already", retry_after=1.0)
        self.take_in(request)

    def take_in(self, request: Request) -> None:
        """As `add`, for a caller who has asked all that already."""
        room = min(self.max_context, len(request.prompt) + request.sampling.max_tokens)
        adapter = 0 if request.adapter is None else 1 + list(self.config.adapters).index(request.adapter)
        completions = [Completion(request, index, room, adapter) for index in range(request.n)]
        for completion in completions:
            completion.after = completions[0] if completion.index and self.config.prefix_cache else None
            if self.tokenizer is not None:
                completion.text = TextStream(self.tokenizer, request.prompt, request.sampling)
            self.scheduler.add(completion)
        self._live[request.id] = completions

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Compiles what `Request.grammar` asks for; any thread may ask it.

        Raises:
            ValueError: the engine has no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("structured output needs a tokenizer, and the model's folder has no tokenizer.json")
        return GrammarCompiler(self.tokenizer, self.eos)

    @property
    def free_places(self) -> int:
        """Completions that could begin now."""
        return max(0, self.config.max_sequences - len(self.scheduler.running))

    def cancel(self, id: str) -> None:
        """End a request's completions; the next step tells so. One that has ended, or never was, is nothing."""
        for completion in list(self._live.get(id, ())):
            self._told.append(self._end(completion, "cancelled"))

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do or to tell."""
        return bool(self.scheduler or self._told)

    def step(self) -> list[Output]:
        """Schedule, run, deliver: what came of it, in the order of the batch."""
        outputs = self._overdue()
        self.computing.begin()
        works = self.scheduler.schedule()
        if works:
            began = time.monotonic()
            self._counts["steps"] += 1
            outputs += self._deliver(works, self.computing(works))
            seconds, passes = time.monotonic() - began, self.computing.passes
            self.scheduler.courtesy.times.took(self.scheduler.planned // passes, seconds / passes)
        return outputs

    def stats(self) -> Stats:
        blocks, counts = self.blocks, self._counts
        running, waiting = (
            Counter(one.request.adapter for one in list(ones))
            for ones in (self.scheduler.running, self.scheduler.waiting)
        )
        return Stats(
            running=len(self.scheduler.running), waiting=len(self.scheduler.waiting),
            cache_tokens=blocks.count * blocks.size, block_tokens=blocks.size,
            cache_used=1 - blocks.num_free / blocks.count, steps=counts["steps"],
            prompt_tokens=counts["prompt"], cached_tokens=counts["cached"], new_tokens=counts["new"],
            preemptions=self.scheduler.preemptions, drafted=counts["drafted"], accepted=counts["accepted"],
            finished=dict(self._finished),
            adapters={name: (running[name], waiting[name]) for name in self.config.adapters},
        )  # fmt: skip

    def forget_prefixes(self) -> None:
        """Drop what the prefix cache holds, as new weights demand. Only while nothing runs."""
        self.blocks.forget_all()

    def close(self) -> None:
        """End the processes that the engine began, if any."""
        if "grammars" in self.__dict__:
            self.grammars.close()
        if self.ranks is not None:
            self.ranks.close()
            self.ranks = self.runner.ranks = None

    def _overdue(self) -> list[Output]:
        """Endings between the steps: cancelled requests, and those whose time is up."""
        told, self._told = self._told, []
        now = time.monotonic()
        late = [one for one in self.scheduler if one.request.deadline is not None and one.request.deadline <= now]
        return told + [self._end(completion, "deadline") for completion in late]

    def _deliver(self, works: list[Work], found: dict[int, Found]) -> list[Output]:
        """Give every sequence its new tokens."""
        outputs = []
        for work in works:
            outputs += self._extend(work, found[id(work)])
        return outputs

    def _extend(self, work: Work, found: Found) -> list[Output]:
        """A sequence's new tokens, up to the first that its draft did not foresee, and what they mean for it."""
        completion, old = work.sequence, len(work.sequence.tokens)
        begins = not completion.begun
        finish: Finish | None = None
        tokens, text, stopped_by, draft = [], "", None, completion.draft
        for number, token in enumerate(found.chosen):
            if token is None:
                self.scheduler.computed(work)
                return [self._end(completion, "error", error="the model's logits are not finite numbers")]
            tokens.append(token)
            finish, more, stopped_by = completion.push(token)
            text += more
            if finish or number >= len(draft) or draft[number] != token:
                break
        self._counts.update(new=len(tokens))
        if self.drafter is not None:
            checked, taken = max(0, len(found.chosen) - 1), max(0, len(completion.tokens) - old - 1)
            self._counts.update(drafted=checked, accepted=taken)
        completion.draft = []
        self.scheduler.computed(work)
        if not tokens:
            return []
        if begins:
            self._counts.update(prompt=len(completion.request.prompt), cached=completion.cached or 0)
        asked = completion.request
        output = Output(
            asked.id, completion.index, tuple(tokens), text,
            logprobs=tuple(found.logprobs[: len(tokens)]) if asked.logprobs is not None else None,
            prompt_logprobs=tuple(completion.prompt_logprobs)
            if begins and asked.prompt_logprobs is not None and completion.index == 0 else None,
            cached=completion.cached or 0, started=completion.started if begins else None,
        )  # fmt: skip
        if finish is None:
            return [output]
        self._end(completion, finish)
        error = completion.matcher.error if completion.matcher else ""
        return [replace(output, finish=finish, stopped_by=stopped_by, error=error or None)]

    def _end(self, completion: Completion, finish: Finish, error: str | None = None) -> Output:
        self.scheduler.remove(completion)
        self._finished[finish] += 1
        left = self._live[completion.request.id]
        left.remove(completion)
        if not left:
            del self._live[completion.request.id]
        return Output(completion.request.id, completion.index, finish=finish, error=error)
