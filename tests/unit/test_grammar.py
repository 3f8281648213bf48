"""Structured output: whatever the model would say, what it says has the form."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from test_generate_text import byte_tokenizer

from weft.models.decoder import Decoder
from weft.models.shape import Shape
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.requests import forms
from weft.serve.requests.forms import HELPERS, Helpers, Kind
from weft.serve.requests.grammar import Grammar, GrammarCompiler
from weft.serve.requests.request import Output, Request, Sampling

EOS = 255
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@cache
def engine(eos: tuple[int, ...] = (EOS,)) -> Engine:
    torch.manual_seed(0)
    shape = Shape(num_layers=1, hidden=32, num_heads=2, ffn=64, vocab=260, max_seq=256, init_std=0.5)
    return Engine(Decoder(shape), byte_tokenizer(), EngineConfig(block_tokens=4, draft_tokens=2), eos)


def say(to: Engine, *grammars: Grammar | None, **sampling: object) -> list[list[Output]]:
    prompt = byte_tokenizer().encode("Hi").ids
    for index, grammar in enumerate(grammars):
        settings = Sampling(1.5, seed=index, **{"max_tokens": 120, "eos": to.eos, **sampling})  # type: ignore[arg-type]
        to.add(Request(str(index), prompt, settings, grammar=grammar))
    found: list[list[Output]] = [[] for _ in grammars]
    while to.busy:
        for output in to.step():
            found[int(output.id)].append(output)
    return found


def text(outputs: list[Output]) -> str:
    return "".join(output.text for output in outputs)


@pytest.mark.parametrize("eos", [(EOS,), ()])
def test_texts_have_their_form_and_neighbours_are_left_alone(eos: tuple[int, ...]) -> None:
    to = engine(eos)
    grammars = [
        None, to.grammars.compile("json_schema", SCHEMA), to.grammars.compile("regex", "[A-C]{3}-[0-9]{2,4}"),
        to.grammars.compile("lark", 'start: "yes" | "no" | "per" "haps"+ "!"'),
    ]  # fmt: skip
    for _ in range(3):
        free, person, code, answer = say(to, *grammars)
        assert person[-1].finish == code[-1].finish == answer[-1].finish == "stop"
        said = json.loads(text(person))
        assert said.keys() == {"name", "age"}
        assert 0 <= said["age"] <= 99
        assert re.fullmatch("[A-C]{3}-[0-9]{2,4}", text(code))
        assert re.fullmatch("yes|no|per(haps)+!", text(answer))
        assert text(free) == text(say(to, None)[0])


@pytest.mark.parametrize(("kind", "source"), [("json", ""), ("json_schema", SCHEMA)])
def test_blanks_between_the_signs_of_json_end(kind: Kind, source: dict[str, object] | str) -> None:
    brace, blank = byte_tokenizer().encode("{ ").ids
    matcher = engine().grammars.compile(kind, source).matcher()
    matcher.push(brace)
    written = 0
    while written < 1000:
        logits = torch.zeros(260)
        matcher.forbid(logits)
        if logits[blank] < 0:
            break
        matcher.push(blank)
        written += 1
    assert written == 64


def test_a_form_that_goes_on_ends_with_the_room() -> None:
    [outputs] = say(engine(), engine().grammars.compile("json"), max_tokens=5)
    assert outputs[-1].finish in ("length", "stop")
    assert text(outputs).startswith("{")


def test_a_form_is_compiled_once() -> None:
    compiler = engine().grammars
    assert compiler.compile("regex", "a+") is compiler.compile("regex", "a+")


def test_a_form_that_overflows_the_stack_harms_nobody() -> None:
    """4,000 choices, each of the next: what compiles that recursively dies."""
    choices = {
        f"d{at}": {
            "anyOf": [{"$ref": f"#/$defs/d{at + 1}"}, {"type": "array", "items": {"$ref": f"#/$defs/d{at + 1}"}}]
        }
        for at in range(2000)
    }
    compiler = engine().grammars
    for _ in range(2):
        with pytest.raises(ValueError, match="the json_schema cannot be compiled: it is too deep"):
            compiler.compile("json_schema", {"$ref": "#/$defs/d0", "$defs": {**choices, "d2000": {"type": "null"}}})
    compiler.compile("regex", "after+")


def stop(process: subprocess.Popen[bytes]) -> None:
    os.kill(process.pid, signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)  # until then it may go on


def test_a_helper_that_stops_in_the_middle_of_a_line_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import time; print('half a', end='', flush=True); time.sleep(60)"
    helper = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    helpers = Helpers(lambda: ("", ()))
    monkeypatch.setattr(helpers, "_begin", lambda: helper)
    with pytest.raises(ValueError, match="the regex took more than"):
        helpers.check("regex", "a", timeout=1)
    assert helper.returncode is not None


def test_a_helper_that_stops_before_it_has_read_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is longer than what a pipe holds."""
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    monkeypatch.setattr(forms, "START_SECONDS", 0.3)
    helpers = Helpers(lambda: ("a" * 1_000_000, ()))
    monkeypatch.setattr(sys, "executable", str(silent))
    with pytest.raises(ValueError, match="cannot be compiled at the moment"):
        helpers.check("regex", "a", timeout=60)
    assert not helpers._processes
    assert helpers._free == [None] * HELPERS


def test_a_helper_that_died_at_rest_is_replaced() -> None:
    compiler = GrammarCompiler(byte_tokenizer(), (EOS,))
    compiler.compile("regex", "rest")
    [dead] = compiler._helpers._processes
    dead.kill()
    dead.wait()
    compiler.compile("regex", "after rest")
    assert dead.stdin is not None
    assert dead.stdin.closed
    [fresh] = compiler._helpers._processes
    assert fresh.poll() is None
    compiler.close()


def test_slow_forms_give_way_to_others() -> None:
    """Two that would take for ever occupy both helpers: whoever comes next waits about a second."""
    compiler = GrammarCompiler(byte_tokenizer(), (EOS,))
    compiler.compile("regex", "a")
    helpers = compiler._helpers
    with ThreadPoolExecutor(2) as threads:
        slow = []
        for number in range(HELPERS):
            [helper] = helpers._processes
            stop(helper)  # what a form without an end looks like
            helpers._processes.discard(helper)
            slow.append((threads.submit(compiler.compile, "regex", f"b{{{number}}}", 60), helper))
            if number < HELPERS - 1:
                while not len(helpers._free) < HELPERS:
                    time.sleep(0.001)
                compiler.compile("regex", "c")  # begins the other one
        began = time.monotonic()
        compiler.compile("regex", "d", 60)
        assert time.monotonic() - began < 30  # not 60: one of them was ended for it
        assert isinstance(slow[0][0].exception() or slow[1][0].exception(), ValueError)
        for future, helper in slow:
            helper.kill()
            future.exception()
    compiler.close()


def test_a_form_that_is_tried_while_its_engine_ends_is_told_to_come_later() -> None:
    """Its helper's pipes are closed by the thread that waits for it, and no sooner: their numbers may be others' then."""
    compiler = GrammarCompiler(byte_tokenizer(), (EOS,))
    compiler.compile("regex", "a")
    [helper] = compiler._helpers._processes
    stop(helper)
    with ThreadPoolExecutor(1) as thread:
        tried = thread.submit(compiler.compile, "regex", "b")
        while len(compiler._helpers._free) == HELPERS:
            time.sleep(0.001)
        compiler.close()
        with pytest.raises(
            ValueError, match="forms cannot be compiled at the moment: leave the form out, or try again"
        ):
            tried.result(20)
    assert helper.stdout is not None
    assert helper.stdout.closed
    assert not compiler._helpers._processes


def test_no_helper_begins_for_an_engine_that_has_ended() -> None:
    compiler = GrammarCompiler(byte_tokenizer(), (EOS,))
    compiler.close()
    with pytest.raises(ValueError, match="forms cannot be compiled at the moment"):
        compiler.compile("regex", "a")
    assert not compiler._helpers._processes


def test_the_start_of_a_helper_takes_no_forms_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of 256,000 tokens takes three seconds to read, and more where a machine has other work."""
    compiler = GrammarCompiler(byte_tokenizer(), (EOS,))
    begin, helpers = compiler._helpers._begin, compiler._helpers

    def slowly() -> subprocess.Popen[bytes]:
        time.sleep(1.5)
        return begin()

    monkeypatch.setattr(helpers, "_begin", slowly)
    compiler.compile("regex", "a", timeout=1.5)
    compiler.close()


def test_forms_that_cannot_be_followed_are_refused() -> None:
    compiler = engine().grammars
    for kind, source, sentence in [
        ("regex", "((", "the regex cannot be compiled: .*regex"),
        ("regex", "[0-9", "regex parse error: unclosed character class$"),
        ("json_schema", "{", "the json_schema cannot be compiled"),
        ("json_schema", {"type": "nonsense"}, "Invalid type: nonsense"),
        ("lark", "start: x", 'unknown name: "x"'),
        ("xml", "", "the form is a 'xml'; it must be one of json, json_schema, regex, lark"),
        ("regex", "a" * 300_000, "the regex has 300000 characters"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            compiler.compile(kind, source)  # type: ignore[arg-type]
    for helper in compiler._helpers._processes:
        stop(helper)
    with pytest.raises(
        ValueError, match=r"the regex took more than (0\.[2-9]\d*|[1-9][\d.]*) s to compile: simplify it"
    ):
        compiler.compile("regex", "b+", timeout=0.2)
    grammar = compiler.compile("regex", "a+")
    with pytest.raises(ValueError, match="min_tokens would go on"):
        engine().check(Request("a", [1], Sampling(min_tokens=3), grammar=grammar))
    without = Engine(Decoder(Shape(num_layers=1, hidden=8, num_heads=1, ffn=8, vocab=9, max_seq=8)))
    with pytest.raises(ValueError, match="structured output needs a tokenizer"):
        _ = without.grammars
