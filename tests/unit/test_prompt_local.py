"""A checkpoint asked in this process, against the parts that other tests prove; and the command lines around it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from prompt_models import Parity, save_tiny
from typer.testing import CliRunner, Result

from weft.cli.app import app
from weft.cli.bar import progress_bar
from weft.prompt.chat import CUT, Chat
from weft.prompt.examples import Examples
from weft.prompt.file import OutputCheck, Prompt, PromptSampling, Shots, read_prompt, write_prompt
from weft.prompt.local import LocalModel, written_out
from weft.prompt.model import Ask, Form, Piece
from weft.prompt.open import open_model
from weft.prompt.perplexity import perplexity
from weft.prompt.score import ask
from weft.serve.generate import complete
from weft.serve.requests.request import Sampling
from weft.serve.server.chat import find_template


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> LocalModel:
    return LocalModel(folder)


def told(model: LocalModel, text: str) -> torch.Tensor:
    """Log-probability of each byte of a text but the first, by the model without a cache."""
    ids = torch.tensor([model.encode(text)])
    with torch.inference_mode():
        logprobs = model.decoder(ids[:, :-1])[0].log_softmax(dim=-1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0]


# -- asking -----------------------------------------------------------------------------------------------------------


def test_many_are_asked_at_once_and_each_gets_its_own(model: LocalModel) -> None:
    texts = [f"number {number}" for number in range(100)]
    asks = [Ask(text, PromptSampling(max_tokens=1 + index % 4)) for index, text in enumerate(texts)]
    found = dict(model.complete(asks))
    assert sorted(found) == list(range(100))
    for index in (0, 7, 98):
        ids = model.encode(texts[index])
        [expected] = complete(model.decoder, [ids], Sampling(max_tokens=1 + index % 4))
        assert found[index].texts == (model.tokenizer.decode(expected).rstrip("\ufffd"),)
        assert (found[index].prompt_tokens, found[index].new_tokens) == (len(ids), len(expected))
        assert found[index].cut == 1
        assert found[index].seconds > 0


def test_samples_of_a_seed_are_the_same_and_differ_among_themselves(model: LocalModel) -> None:
    asked = Ask("abc", PromptSampling(temperature=1.0, max_tokens=8, seed=3), n=5)
    [(_, first)], [(_, again)] = model.complete([asked]), model.complete([asked])
    assert first.texts == again.texts
    assert len(set(first.texts)) > 1
    assert first.new_tokens == 40


def test_an_answer_has_the_form_that_it_is_held_to(model: LocalModel) -> None:
    output = OutputCheck(choices=("yes", "no"))
    prompt = Prompt(name="p", question="{{ q }}", output=output, sampling=PromptSampling(max_tokens=8))
    answers, _ = ask(prompt, [{"q": "rain"}, {"q": "sun"}, {"q": "snow"}], model)
    assert {one.answer for one in answers} <= {"yes", "no"}
    assert not sum(one.malformed for one in answers)
    with pytest.raises(ValueError, match="cannot be compiled"):
        list(model.complete([Ask("a", PromptSampling(), form=Form("regex", "("))]))


def test_whoever_stops_reading_leaves_nothing_behind(model: LocalModel) -> None:
    asks = [Ask("abc", PromptSampling(max_tokens=50)) for _ in range(100)]
    started = model.stream(asks[0])
    next(started)
    started.close()  # type: ignore[attr-defined]
    begun = model.complete([Ask("a", PromptSampling(max_tokens=1)), *asks])
    next(begun)
    begun.close()  # type: ignore[attr-defined]
    assert not model.engine.busy
    assert "".join(text for text, _ in model.stream(asks[0])) == next(model.complete(asks[:1]))[1].texts[0]


def test_a_prompt_that_leaves_no_room_is_told_by_its_number(model: LocalModel) -> None:
    with pytest.raises(ValueError, match=r"prompt 2: .*256"):
        list(model.complete([Ask("a", PromptSampling()), Ask("a" * 300, PromptSampling())]))


# -- judging ----------------------------------------------------------------------------------------------------------


def test_likelihoods_are_of_the_second_text_alone(model: LocalModel) -> None:
    texts = [("one two", " three"), ("one two", " fo"), ("é", "è!")]
    found = dict(model.likelihoods(texts))
    for index, (context, text) in enumerate(texts):
        expected = told(model, context + text)[-len(text.encode()) :]
        assert found[index].logprob == pytest.approx(float(expected.sum()), abs=1e-3)
        assert found[index].tokens == len(text.encode())
    [(_, best)] = model.complete([Ask("one two", PromptSampling(max_tokens=1))])
    [(_, greedy)] = model.likelihoods([("one two", best.texts[0])]) if best.texts[0] else [(0, found[0])]
    assert greedy.greedy or not best.texts[0]
    assert not found[0].greedy
    with pytest.raises(ValueError, match="at least one token before"):
        list(model.likelihoods([("", "a")]))


def test_perplexity_is_the_models(model: LocalModel) -> None:
    text = "a text of some length, which is no whole number of windows long" * 4
    ids = model.encode(text)
    whole = perplexity("t", ids[:200], 200, model)
    assert whole.nats == pytest.approx(-float(told(model, text[:200]).mean()), abs=1e-4)
    assert whole.bits_per_byte == pytest.approx(whole.nats * 199 / 200 / math.log(2))
    assert math.isnan(whole.error)
    side_by_side = perplexity("t", ids, len(text), model, window=21)
    expected = [told(model, text[start : start + 21]) for start in range(0, len(text) - 1, 20)]
    assert side_by_side.nats == pytest.approx(-float(torch.cat(expected).mean()), abs=1e-4)
    assert side_by_side.tokens == len(ids) - 1
    sliding = perplexity("t", ids[:40], 40, model, window=21, stride=1)
    lasts = [told(model, text[stop - 21 : stop])[-1:] for stop in range(22, 41)]
    expected = torch.cat([told(model, text[:21]), *lasts])
    assert sliding.nats == pytest.approx(-float(expected.mean()), abs=1e-4)


def test_embeddings_choose_examples(model: LocalModel) -> None:
    pool = tuple({"text": text} for text in ("aaaa", "zzzz 9"))
    prompt = Prompt(
        name="p", question="{{ text }}", answer="x", examples=pool,
        shots=Shots(count=1, select="similar", by="embeddings"),
    )  # fmt: skip
    assert Examples(prompt, model.embed).choose("zzzz 8") == [pool[1]]
    ids = torch.tensor([model.encode("aaaa")])
    with torch.inference_mode():
        assert model.decoder.norm is not None
        hidden = model.decoder.norm(model.decoder.body(ids))[0].mean(dim=0)
    assert torch.allclose(torch.tensor(model.embed(["aaaa"])[0]).float(), hidden / hidden.norm(), atol=1e-5)


# -- conversations ----------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ bos_token }}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS = ({"role": "user", "content": "hi"},)


def test_turns_are_written_as_the_models_template_wants_them(tmp_path: Path) -> None:
    settings = {"chat_template": TEMPLATE, "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert written_out(find_template(tmp_path), TURNS) == "<s>[user]hi[assistant]"
    with pytest.raises(ValueError, match="refuses these messages: no tools"):
        written_out(find_template(tmp_path), ({"role": "tool", "content": ""},))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!", encoding="utf-8")
    assert written_out(find_template(tmp_path), TURNS) == "hi!"
    assert written_out(None, TURNS) == "user: hi\nassistant:"


def test_a_conversation_remembers_and_obeys(tmp_path: Path) -> None:
    seen: list[Ask] = []

    class Echo(Parity):
        def stream(self, ask: Ask):  # type: ignore[no-untyped-def]
            seen.append(ask)
            yield from (Piece(" you said "), Piece(ask.prompt[-1]["content"], cut=len(seen) > 1))  # type: ignore[index]

    talk, said = (
        Chat(Echo(), Prompt(name="c", instruction="Be kind to {{ who }}.", question="{{ text }}"), {"who": "me"}),
        [],
    )
    saves = f"/save {tmp_path / 'talk.json'}", f"/save {tmp_path / 'nowhere' / 'talk.json'}"
    for line in ("a", "b", "/undo", "c", *saves, "/help", "/reset", "d", "/quit"):
        talk.say(line, said.append)
    assert [turn["content"] for turn in seen[2].prompt] == ["Be kind to me.", "a", "you said a", "c"]  # type: ignore[index]
    assert len(seen[3].prompt) == 2
    assert json.loads((tmp_path / "talk.json").read_text())[-1] == {"role": "assistant", "content": "you said c"}
    assert "/undo takes" in "".join(said)
    assert "".join(said).startswith(f" you said a\n you said b\n{CUT}\n")
    assert "nowhere/talk.json cannot be written: No such file or directory\n" in "".join(said)
    assert talk.ended


# -- commands ---------------------------------------------------------------------------------------------------------


def weft(*words: object, stdin: str = "") -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], input=stdin)


def save_prompts(folder: Path) -> tuple[Path, Path, Path]:
    base = Prompt(name="p", question="{{ text }} is", answer=" {{ label }}", sampling=PromptSampling(max_tokens=3))
    write_prompt(base, folder / "a.toml")
    held = base.model_copy(update={"name": "q", "output": OutputCheck(choices=("odd", "even"))})
    write_prompt(held.model_copy(update={"sampling": PromptSampling(max_tokens=8)}), folder / "b.toml")
    rows = [{"text": str(number), "label": "odd" if number % 2 else "even"} for number in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "a.toml", folder / "b.toml", folder / "rows.jsonl"


def test_run_asks_and_writes(folder: Path, tmp_path: Path) -> None:
    a, b, rows = save_prompts(tmp_path)
    shown = weft("prompt", "run", a, "--set", "text=7", "--dry-run")
    assert "7 is" in shown.stdout
    asked = weft("prompt", "run", b, "--checkpoint", folder, "--data", rows, "--out", tmp_path / "out.jsonl")
    assert asked.exit_code == 0, asked.output
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == asked.stdout.split()
    assert {line["answer"] for line in lines} <= {"odd", "even"}
    assert lines[3]["text"] == "3"
    assert "cut off" not in asked.stderr
    cut = weft("prompt", "run", a, "--checkpoint", folder, "--set", "text=7")
    assert cut.stderr.endswith("; cut off by max_tokens or the context's end: 1\n")


def test_compare_and_search_tell_what_they_found(folder: Path, tmp_path: Path) -> None:
    a, b, rows = save_prompts(tmp_path)
    compared = weft(
        "prompt", "compare", a, b, "--data", rows, "--checkpoint", folder, "--out", tmp_path / "c.json", "--price-in", 1
    )
    assert compared.exit_code == 0, compared.output
    kept = json.loads((tmp_path / "c.json").read_text())
    assert kept["prompts"][0]["accuracy"] == 0
    assert f"{100 * kept['prompts'][1]['accuracy']:.1f} %" in compared.stdout
    (tmp_path / "tries.txt").write_text("Say odd or even.\n\nodd even odd even\n", encoding="utf-8")
    words = (
        "prompt",
        "search",
        b,
        "--data",
        rows,
        "--budget",
        150,
        "--checkpoint",
        folder,
        "--out",
        tmp_path / "d.toml",
    )
    found = weft(*words, "--rewrites", tmp_path / "tries.txt", "--shots", 2)
    assert found.exit_code == 0, found.output
    assert "had no part in the choice" in found.stdout
    assert (tmp_path / "d.toml").exists() == ("none was better" not in found.stdout)


def test_new_writes_versions(tmp_path: Path) -> None:
    assert weft("prompt", "new", tmp_path / "x" / "mood.toml").exit_code == 0
    assert weft("prompt", "new", tmp_path / "mood-2.toml", "--from", tmp_path / "x" / "mood.toml").exit_code == 0
    text = (tmp_path / "mood-2.toml").read_text()
    assert "version = 2" in text
    assert 'parent = "mood@1:' in text


def test_the_name_of_a_new_prompt_may_be_any(tmp_path: Path) -> None:
    for name in ('a "b"', "back\\slash", "ü {x}"):
        assert weft("prompt", "new", tmp_path / f"{name}.toml").exit_code == 0
        assert read_prompt(tmp_path / f"{name}.toml").name == name


def test_names_of_what_is_under_way_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as show:
        show("te[x]t[/of].py", 1, 2)
    assert "te[x]t[/of].py …" in capsys.readouterr().err


def test_chat_in_the_terminal(folder: Path) -> None:
    talked = weft("prompt", "chat", "--checkpoint", folder, "--max-tokens", 4, stdin="hello\n/reset\n/quit\n")
    assert talked.exit_code == 0, talked.output
    assert "a new conversation" in talked.stdout
    assert "bye" in talked.stdout


def test_eval_scores_texts_and_tasks(folder: Path, tmp_path: Path) -> None:
    _, _, rows = save_prompts(tmp_path)
    (tmp_path / "text.txt").write_text("some text " * 60, encoding="utf-8")
    task = 'name = "parity"\nkind = "choices"\nchoices = ["odd", "even"]\nprompt = "a.toml"\n'
    (tmp_path / "task.toml").write_text(f'{task}data = "{rows.name}"\n', encoding="utf-8")
    words = ("eval", folder, "--text", tmp_path / "text.txt", "--task", tmp_path / "task.toml", "--limit", 10)
    scored = weft(*words, "--out", tmp_path / "e.json", "--stride", 100)
    assert scored.exit_code == 0, scored.output
    kept = json.loads((tmp_path / "e.json").read_text())
    assert kept["texts"][0]["tokens"] == 599
    assert [one["count"] for one in kept["tasks"]] == [10, 10]
    assert f"{kept['tasks'][0]['value']:.4f}" in scored.stdout
    single = weft("eval", folder, "--task", tmp_path / "task.toml", "--limit", 1, "--out", tmp_path / "new" / "e.json")
    assert single.exit_code == 0, single.output
    text = (tmp_path / "new" / "e.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["tasks"][0]["error"] is None  # of one row nothing is known


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prompt", "run", "none.toml"], "there is no config file"),
        (["prompt", "run", "a.toml"], "which model?"),
        (["prompt", "run", "a.toml", "--checkpoint", "x", "--model", "y"], "--model y is one of a server's models"),
        (["prompt", "run", "."], ". cannot be read: Is a directory"),
        (["prompt", "run", "a.toml", "--set", "text"], "write it as name=value"),
        (["prompt", "run", "a.toml", "--set", "text=1", "--data", "rows.jsonl"], "give one of the two"),
        (
            ["prompt", "search", "a.toml", "--data", "rows.jsonl", "--budget", "9", "--out", "a.toml"],
            "is there already",
        ),
        (["prompt", "new", "n.toml", "--kind", "poem"], "must be one of plain, few-shot"),
        (["prompt", "new", "n.toml", "--kind", "plain", "--from", "a.toml"], "--kind plain is of a new prompt"),
        (["prompt", "new", "a.toml"], "is there already"),
        (["prompt", "chat", "a.toml", "--system", "x"], "give one of the two"),
        (["eval", "x"], "nothing to score"),
        (["eval", "x", "--text", "none"], "there is no text file none, nor token files none.bin"),  # before the model
        (["eval", "x", "--text", "."], "there is no text file ., nor token files"),
        (
            ["prompt", "search", "a.toml", "--data", "rows.jsonl", "--budget", "9", "--out", "n", "--rewrites", "none"],
            "--rewrites: there is no file none",
        ),
        (["eval", "x", "--task", "t", "--out", "."], "--out . is a folder: name a file"),
        (["prompt", "run", "a.toml", "--set", "text=1", "--out", "a.toml/b"], "--out a.toml/b: "),
        (["eval", "x", "--lm-eval", "mmlu"], "give its --url"),
        (["eval", "--url", "http://x/v1", "--lm-eval", "mmlu"], "name the served model's folder or checkpoint"),
        (["eval", "x", "--task", "t", "--stride", "4"], "are about a --text"),
        (["eval", "x", "--text", "t", "--limit", "4"], "--limit is about a --task"),
        (["eval", "x", "--text", "t", "--shots", "4"], "are about an --lm-eval task"),
    ],
)
def test_what_cannot_be_done_is_told(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_prompts(tmp_path)
    monkeypatch.chdir(tmp_path)
    failed = weft(*words)
    assert isinstance(failed.exception, ValueError)
    assert said in str(failed.exception)


def test_two_models_are_one_too_many(folder: Path) -> None:
    with pytest.raises(ValueError, match="which model"), open_model(folder, "http://127.0.0.1:1/v1"):
        pass
    with pytest.raises(ValueError, match="nobody answers at"), open_model(None, "http://127.0.0.1:1/v1"):
        pass


def test_nothing_but_the_local_model_imports_torch() -> None:
    modules = (
        "file render examples output score compare search candidates task perplexity harness chat report remote open"
    )
    modules += " journal"
    code = f"import sys, importlib\nfor name in {modules.split()}: importlib.import_module('weft.prompt.' + name)\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
