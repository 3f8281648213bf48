"""A model behind a server says what it says in this process; and what a server may answer instead."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from openai_shaped import Handler, served
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from prompt_models import save_tiny

from weft.cli.app import app
from weft.prompt.file import PromptSampling
from weft.prompt.local import LocalModel
from weft.prompt.model import Ask, Form
from weft.prompt.perplexity import perplexity
from weft.prompt.remote import RemoteModel

GREEDY = PromptSampling(max_tokens=6)
TURNS = ({"role": "user", "content": "hi"},)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    return LocalModel(save_tiny(tmp_path_factory.mktemp("weights") / "tiny"))


@pytest.fixture
def server(local: LocalModel) -> Iterator[tuple[str, type[Handler]]]:
    with served(local) as found:
        yield found


@pytest.fixture
def remote(server: tuple[str, type[Handler]]) -> Iterator[RemoteModel]:
    model = RemoteModel(server[0], at_once=4)
    yield model
    model.close()


def test_answers_are_those_of_this_process(local: LocalModel, remote: RemoteModel) -> None:
    sampled = PromptSampling(temperature=1.0, seed=5, max_tokens=6)
    asks = [
        *(Ask(f"number {number}", GREEDY) for number in range(12)), Ask(TURNS, GREEDY), Ask("a", sampled, n=3),
        Ask("a", GREEDY, form=Form("regex", "yes|no")),
        Ask(TURNS, GREEDY, form=Form("json_schema", json.dumps({"type": "integer"}))),
    ]  # fmt: skip
    here = {index: reply.texts for index, reply in local.complete(asks)}
    there = dict(remote.complete(asks))
    assert {index: reply.texts for index, reply in there.items()} == here
    assert there[0].prompt_tokens == len("number 0")
    assert here[14][0] in ("yes", "no")
    assert remote.name == "tiny"


def test_streams_are_those_of_this_process(local: LocalModel, remote: RemoteModel) -> None:
    for prompt in ("abc", TURNS):
        assert "".join(remote.stream(Ask(prompt, GREEDY))) == "".join(local.stream(Ask(prompt, GREEDY)))


def test_likelihoods_perplexity_and_embeddings_are_those_of_this_process(
    local: LocalModel, remote: RemoteModel
) -> None:
    texts = [("one two", " three"), ("ab", "c"), ("one ", "é")]
    here, there = dict(local.likelihoods(texts)), dict(remote.likelihoods(texts))
    for index in here:
        assert there[index].logprob == pytest.approx(here[index].logprob, abs=1e-4)
        assert (there[index].tokens, there[index].greedy) == (here[index].tokens, here[index].greedy)
    ids = remote.encode("some text " * 40)
    assert ids == local.encode("some text " * 40)
    assert remote.longest == local.longest
    assert perplexity("t", ids, 400, remote).nats == pytest.approx(perplexity("t", ids, 400, local).nats, abs=1e-5)
    assert np.allclose(remote.embed(["a", "bc"]), local.embed(["a", "bc"]), atol=1e-5)
    with pytest.raises(ValueError, match="at least one token before"):
        list(remote.likelihoods([("", "a")]))


def test_a_busy_server_is_asked_again(server: tuple[str, type[Handler]], remote: RemoteModel) -> None:
    server[1].busy += [429, 503, 429]
    assert len(dict(remote.complete([Ask("a", GREEDY), Ask("b", GREEDY)]))) == 2
    assert len(server[1].bodies) == 5


def test_what_a_server_refuses_is_told(server: tuple[str, type[Handler]], remote: RemoteModel) -> None:
    with pytest.raises(ValueError, match=r"/v1/completions refused \(400\): .*256"):
        list(remote.complete([Ask("a" * 300, GREEDY)]))
    server[1].busy += [401]
    with pytest.raises(ValueError, match=r"refused \(401\): come back"):
        next(remote.stream(Ask("a", GREEDY)))
    server[1].busy += [503] * 6
    with pytest.raises(ValueError, match=r"refused \(503\)"):
        list(remote.complete([Ask("a", GREEDY)]))


def test_the_key_goes_with_every_request(server: tuple[str, type[Handler]]) -> None:
    model = RemoteModel(server[0], "tiny", "secret")
    list(model.complete([Ask("a", GREEDY)]))
    model.close()
    assert server[1].bodies[-1]["key"] == "Bearer secret"
    assert server[1].bodies[-1]["model"] == "tiny"


def test_commands_take_a_url(server: tuple[str, type[Handler]], tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(
        'name = "p"\nquestion = "{{ text }}"\n[sampling]\nmax_tokens = 4\n', encoding="utf-8"
    )
    words = ["prompt", "run", str(tmp_path / "p.toml"), "--set", "text=abc", "--url", server[0]]
    asked = CliRunner().invoke(app, words)
    assert asked.exit_code == 0, asked.output
    assert server[1].bodies[-1]["prompt"] == "abc"
    (tmp_path / "t.txt").write_text("a text", encoding="utf-8")
    scored = CliRunner().invoke(app, ["eval", "--text", str(tmp_path / "t.txt"), "--url", server[0]])
    assert "perplexity" in scored.stdout
