"""A model behind weft's server says what it says in this process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from served import Served, make_folder, model, served
from typer.testing import CliRunner

import weft.prompt.remote
from weft.cli.app import app
from weft.prompt.file import PromptSampling
from weft.prompt.local import LocalModel
from weft.prompt.model import Ask, Form, Model, Reply
from weft.prompt.perplexity import perplexity
from weft.prompt.remote import RemoteModel

GREEDY = PromptSampling(max_tokens=6)
THOUGHTFUL = Form("regex", "<think>Well\\.</think>yes")
TURNS = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def local(folder: Path) -> LocalModel:
    return LocalModel(folder)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    with served(model(folder), apart=True) as found:
        yield found


@pytest.fixture(scope="module")
def remote(server: Served) -> Iterator[RemoteModel]:
    found = RemoteModel(f"{server.url}/v1", at_once=4)
    yield found
    found.close()


def test_answers_are_those_of_this_process(local: LocalModel, remote: RemoteModel) -> None:
    sampled = PromptSampling(temperature=1.0, seed=5, max_tokens=6)
    asks = [
        *(Ask(f"number {number}", GREEDY) for number in range(12)), Ask(TURNS, GREEDY), Ask("a", sampled, n=3),
        Ask("a", GREEDY, form=Form("regex", "yes|no")),
        Ask(TURNS, GREEDY, form=Form("json_schema", json.dumps({"type": "integer"}))),
        Ask("b", PromptSampling(max_tokens=40, stop=("e",))),
        Ask(TURNS, PromptSampling(max_tokens=40), form=THOUGHTFUL),
    ]  # fmt: skip
    here, there = dict(local.complete(asks)), dict(remote.complete(asks))
    for index in here:
        assert there[index].texts == here[index].texts
        assert (there[index].cut, there[index].prompt_tokens) == (here[index].cut, here[index].prompt_tokens)
        assert there[index].new_tokens == here[index].new_tokens
    assert here[14].texts[0] in ("yes", "no")
    assert here[17].texts == ("yes",)  # what is thought is not said
    assert remote.name == "tiny"


def test_what_a_models_makers_advise_holds_in_both(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "advised")
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 2, "temperature": 0.1, "eos_token_id": 256}))
    ask = Ask("abc", PromptSampling(temperature=1.0, seed=5, max_tokens=20))
    here = LocalModel(folder)
    with served(model(folder)) as one:
        there = RemoteModel(f"{one.url}/v1")
        texts = [reply.texts for asked in (here, there) for _, reply in asked.complete([ask])]
        there.close()
    here.close()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 256}))
    plain = LocalModel(folder)
    [(_, other)] = plain.complete([ask])
    plain.close()
    assert texts[0] == texts[1] != other.texts


def streamed(model: Model, ask: Ask) -> tuple[str, bool]:
    """A text that is read as it comes, and whether it was cut off."""
    texts, cuts = zip(*model.stream(ask), strict=True)
    return "".join(texts), any(cuts)


def test_streams_are_those_of_this_process(local: LocalModel, remote: RemoteModel) -> None:
    for ask in (Ask("abc", GREEDY), Ask(TURNS, GREEDY), Ask(TURNS, PromptSampling(max_tokens=40), form=THOUGHTFUL)):
        text, cut = streamed(local, ask)
        assert streamed(remote, ask) == (text, cut)
        assert cut == (ask.form is None)  # no word of this model ends anything, but a form does


def test_what_is_judged_is_judged_as_in_this_process(local: LocalModel, remote: RemoteModel) -> None:
    texts = [("one two", " three"), ("ab", "c"), ("one ", "é"), ("é", "è!")]
    here, there = dict(local.likelihoods(texts)), dict(remote.likelihoods(texts))
    for index in here:
        assert there[index].logprob == pytest.approx(here[index].logprob, abs=1e-4)
        assert (there[index].tokens, there[index].greedy) == (here[index].tokens, here[index].greedy)
    ids = remote.encode("some text " * 80)
    assert ids == local.encode("some text " * 80)
    assert remote.longest == local.longest
    assert perplexity("t", ids, 800, remote).nats == pytest.approx(perplexity("t", ids, 800, local).nats, abs=1e-5)
    many = [f"text {number}" for number in range(130)]  # more than the server takes at once
    assert np.allclose(remote.embed(many), local.embed(many), atol=1e-5)
    with pytest.raises(ValueError, match="at least one token before"):
        list(remote.likelihoods([("", "a")]))


def test_a_busy_server_is_asked_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(model(folder, max_sequences=1, max_waiting=0)) as busy:
        eager = RemoteModel(f"{busy.url}/v1", at_once=3)
        asks = [Ask("a", PromptSampling(max_tokens=60)) for _ in range(3)]
        assert len({reply.texts for _, reply in eager.complete(asks)}) == 1
        monkeypatch.setattr(weft.prompt.remote, "TRIES", 1)
        with pytest.raises(ValueError, match=r"refused \(429\)"):
            list(eager.complete(asks * 4))
        eager.close()


def test_what_a_server_refuses_is_told(remote: RemoteModel) -> None:
    with pytest.raises(ValueError, match=r"/v1/completions refused \(400\): .*512"):
        list(remote.complete([Ask("a" * 600, GREEDY)]))
    with pytest.raises(ValueError, match=r"/v1/completions refused \(400\)"):
        next(remote.stream(Ask("a" * 600, GREEDY)))


def test_a_row_that_is_refused_costs_no_other_its_answer(server: Served, tmp_path: Path) -> None:
    prompt, rows, out = (tmp_path / name for name in ("p.toml", "rows.jsonl", "kept/out.jsonl"))
    text = 'name = "p"\nquestion = "{{ text }}"\nlabel = "{{ text }}"\n[sampling]\nmax_tokens = 4\n'
    prompt.write_text(text, encoding="utf-8")
    asked = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "a" * 600, "two", "three"))
    rows.write_text(asked, encoding="utf-8")
    words = [str(prompt), "--data", str(rows), "--out", str(out), "--url", f"{server.url}/v1"]
    failed = CliRunner().invoke(app, ["prompt", "run", *words])
    assert "1 of 4 requests; number 2: " in str(failed.exception)
    assert f"3 of 4 rows were answered; they are in {out}" in failed.stderr
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == ["one", "two", "three"]
    failed = CliRunner().invoke(app, ["prompt", "compare", *words])  # which can make nothing of a part
    assert "/v1/completions refused (400): " in str(failed.exception)
    assert "of 4 requests" not in str(failed.exception)


def test_what_was_on_its_way_when_one_was_refused_is_told() -> None:
    begun = threading.Event()

    def answer(request: httpx.Request) -> httpx.Response:
        said = json.loads(request.content)["prompt"]
        if said == "bad":
            begun.wait(10)
            return httpx.Response(400, json={"error": {"message": "no"}})
        begun.set()
        time.sleep(0.2)
        return httpx.Response(200, json={"choices": [{"index": 0, "text": said}]})

    with served_by(answer):
        eager = RemoteModel("http://somewhere/v1", "m", at_once=2)
        told: dict[int, Reply] = {}
        with pytest.raises(ValueError, match=r"refused \(400\): no"):
            told.update(eager.complete([Ask(text, GREEDY) for text in ("good", "bad", "late", "later")]))
        eager.close()
    assert told[0].texts == ("good",)
    assert told.keys() <= {0, 2}  # the third may have been on its way, too; the fourth was never sent


@pytest.mark.parametrize("body", ["<html>", "[]", '{"object": "list"}'])
def test_what_is_no_such_server_is_told(body: str) -> None:
    """And one that asks for patience until a date is asked again."""
    answers = iter([httpx.Response(503, headers={"Retry-After": "Fri, 27 Nov 2026 00:00:00 GMT"})])
    with served_by(lambda request: next(answers, httpx.Response(200, text=body))):
        with pytest.raises(ValueError, match="does not answer as OpenAI's servers do"):
            RemoteModel("http://somewhere/v1")


def test_an_answer_without_a_choice_is_told_and_one_without_a_number_or_text_is_read() -> None:
    bodies = iter([{"choices": []}, {"choices": None}, {"choices": [{"text": None, "message": None}], "usage": None}])
    with served_by(lambda request: httpx.Response(200, json=next(bodies))):
        model = RemoteModel("http://somewhere/v1", "m")
        for _ in range(2):
            with pytest.raises(ValueError, match="http://somewhere/v1/completions gave no answer"):
                list(model.complete([Ask("a", GREEDY)]))
        [(_, reply)] = model.complete([Ask("a", GREEDY)])
        model.close()
    assert reply.texts == ("",)


@contextmanager
def served_by(handler: Callable[[httpx.Request], httpx.Response]) -> Iterator[None]:
    """Whatever is asked by way of httpx is answered by this."""
    make = httpx.Client
    with pytest.MonkeyPatch.context() as patch:
        transport = httpx.MockTransport(handler)
        patch.setattr(httpx, "Client", lambda **settings: make(transport=transport, headers=settings["headers"]))
        yield


def test_keys_and_names_go_with_every_request(folder: Path) -> None:
    with served(model(folder, "a"), model(folder, "b"), api_keys=("secret",)) as guarded:
        url = f"{guarded.url}/v1"
        with pytest.raises(ValueError, match=r"refused \(401\)"):
            RemoteModel(url)
        with pytest.raises(ValueError, match=r"has 2 models \(a, b\): name one with --model"):
            RemoteModel(url, key="secret")
        known = RemoteModel(url, "b", "secret")
        assert len(dict(known.complete([Ask("a", GREEDY)]))) == 1
        known.close()


def test_commands_take_a_url(server: Served, local: LocalModel, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(
        'name = "p"\nquestion = "{{ text }}"\n[sampling]\nmax_tokens = 4\n', encoding="utf-8"
    )
    url = ("--url", f"{server.url}/v1")
    asked = CliRunner().invoke(app, ["prompt", "run", str(tmp_path / "p.toml"), "--set", "text=abc", *url])
    assert asked.exit_code == 0, asked.output
    assert asked.stdout.strip() == streamed(local, Ask("abc", PromptSampling(max_tokens=4)))[0].strip()
    (tmp_path / "t.txt").write_text("a text", encoding="utf-8")
    scored = CliRunner().invoke(app, ["eval", "--text", str(tmp_path / "t.txt"), *url])
    assert "perplexity" in scored.stdout
    talked = CliRunner().invoke(app, ["prompt", "chat", "--max-tokens", "3", *url], input="hello\n/quit\n")
    assert talked.exit_code == 0, talked.output


def test_a_model_that_is_not_there_is_told_before_anybody_types(server: Served) -> None:
    command = ["prompt", "chat", "--url", f"{server.url}/v1", "--model"]
    typed = "hello\n/quit\n"
    wrong = CliRunner().invoke(app, [*command, "wrong"], input=typed)
    assert isinstance(wrong.exception, ValueError)
    assert "wrong" in str(wrong.exception)
    assert wrong.stdout == ""
    assert CliRunner().invoke(app, [*command, "tiny", "--max-tokens", "3"], input=typed).exit_code == 0


def test_a_server_that_does_not_list_a_model_is_asked_for_it() -> None:
    """As llama.cpp's, which answers under any name; and some list none."""
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(404, json={"detail": "Not Found"})
        asked.append(json.loads(request.content))
        if asked[-1]["model"] == "wrong":
            return httpx.Response(404, json={"error": {"message": "there is no model wrong"}})
        return httpx.Response(200, json={"choices": [{"index": 0, "message": {"content": "h"}}]})

    with served_by(answer):
        command = ["prompt", "chat", "--url", "http://somewhere/v1", "--model"]
        assert CliRunner().invoke(app, [*command, "alias"], input="/quit\n").exit_code == 0
        wrong = CliRunner().invoke(app, [*command, "wrong"], input="/quit\n")
    assert "there is no model wrong" in str(wrong.exception)
    assert [one["max_tokens"] for one in asked] == [1, 1]


@pytest.mark.parametrize("command", ["run", "compare", "search"])
def test_what_breaks_off_goes_on(command: str, tmp_path: Path) -> None:
    """Whoever has asked in vain for a while starts the same command again, and pays for no answer twice."""
    prompt, rows, out = (tmp_path / name for name in ("p.toml", "rows.jsonl", "new/out"))
    prompt.write_text('name = "p"\nquestion = "{{ text }}"\nlabel = "{{ text }}"\n', encoding="utf-8")
    rows.write_text("".join(json.dumps({"text": f"row {at}"}) + "\n" for at in range(40)), encoding="utf-8")
    (tmp_path / "tries").write_text("Say it.\n", encoding="utf-8")
    words = [str(prompt), "--data", str(rows), "--out", str(out), "--url", "http://somewhere/v1", "--at-once", "1"]
    words += ["--budget", "80", "--rewrites", str(tmp_path / "tries")] if command == "search" else []
    served, room = [], 25

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        said = json.loads(request.content)["prompt"]
        if len(served) == room:
            return httpx.Response(402, json={"error": {"message": "no more credit"}})
        served.append(said)
        return httpx.Response(200, json={"choices": [{"index": 0, "text": said if "Say it." in said else "?"}]})

    with served_by(answer):
        failed = CliRunner().invoke(app, ["prompt", command, *words])
        assert "no more credit" in str(failed.exception)
        assert f"answers are kept in {out}.part: the same command goes on from there" in failed.stderr
        kept, room = len((tmp_path / "new/out.part").read_text().splitlines()), 1000
        assert kept in (24, 25)  # the last may have been on its way
        done = CliRunner().invoke(app, ["prompt", command, *words])
    assert done.exit_code == 0, done.output
    assert f"{kept} answers were taken over from {out}.part" in done.stderr
    assert len(served) - len(set(served)) == 25 - kept
    assert not (tmp_path / "new/out.part").exists()
