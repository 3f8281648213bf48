"""EleutherAI's lm-eval itself, by its own command: what it finds through weft's server is what weft finds without one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

import openai
import pytest
from forked import settings, train
from served import SPECIAL, Served, make_folder, model, served
from tokenizers import Tokenizer, normalizers
from typer.testing import CliRunner

from weft.cli.app import app
from weft.data.prepare import prepare
from weft.prompt.local import LocalModel
from weft.prompt.perplexity import perplexity

COUNT = "one two three four five six seven eight nine ten eleven twelve"
ALONE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
"""lm-eval is to ask nobody but the server."""

HEAD = "dataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
CHOOSE = r"""task: choose
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: [" three", " seven", " eight", " twelve"]
doc_to_target: label
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITE = r"""task: write
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{label}}"
generation_kwargs: {until: ["\n"], max_gen_toks: 4, temperature: 0}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
LAST = r"""task: last
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: "{{label}}"
target_delimiter: ""
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
READ = r"""task: read
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
CHAT = WRITE.replace("task: write", "task: chat").replace("max_gen_toks: 4", "max_gen_toks: 6")
MINE = """name = "{kind}"
kind = "{kind}"
data = "rows.jsonl"
{more}
[prompt]
question = "{{{{ text }}}}"
answer = "{{{{ label }}}}"
"""


def rows() -> list[dict[str, str]]:
    """What comes next in counting; the last two are wrong, so that no score is a round one."""
    right = [("one two", " three"), ("five six", " seven"), ("six seven", " eight"), ("ten eleven", " twelve")]
    return [{"text": text, "label": label} for text, label in [*right, ("four five six", " twelve"), ("two", " eight")]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can count to twelve, letter by letter, with 64 at once."""
    folder = tmp_path_factory.mktemp("trained")
    make_folder(folder / "tokenizer")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": COUNT}) + "\n" for _ in range(60)))
    prepare([folder / "text.jsonl"], folder / "tokens", folder / "tokenizer", workers=1)
    config = settings(
        folder / "run",
        model={"vocab": 256 + len(SPECIAL), "max_seq": 64},
        data={"paths": [str(folder / "tokens")], "tokenizer": str(folder / "tokenizer")},
        train={"steps": 60, "seq": 60},
        checkpoint={"every": 60},
    )
    return train(config) / "model"


@pytest.fixture(scope="module")
def server(trained: Path) -> Iterator[Served]:
    with served(model(trained)) as found:
        yield found


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks in lm-eval's form and in weft's, on the same rows."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (folder / "texts.jsonl").write_text(json.dumps({"text": text()}) + "\n")
    for name, what in (("choose", CHOOSE), ("write", WRITE), ("last", LAST), ("read", READ), ("chat", CHAT)):
        data = folder / ("texts.jsonl" if name == "read" else "rows.jsonl")
        (folder / f"{name}.yaml").write_text(HEAD.format(rows=data) + what)
    choices = 'choices = [" three", " seven", " eight", " twelve"]'
    (folder / "choices.toml").write_text(MINE.format(kind="choices", more=choices))
    writing = '[prompt.sampling]\nmax_tokens = 4\nstop = ["\\n"]\n[prompt.output]\nmatch = "exact"\n'
    (folder / "generate.toml").write_text(MINE.format(kind="generate", more="") + writing)
    return folder


def text() -> str:
    """Longer than the model takes, and as long as windows side by side: 3 times the 62 that one foresees. Not all ASCII."""
    return ("ein zwei drei – fünf, und dann: " + 6 * COUNT)[: 3 * 62 - 3]


@pytest.fixture(scope="module")
def runs(server: Served, trained: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What `weft eval --lm-eval` wrote, and the folder of what lm-eval wrote that chatted: both at once, for each reads
    the ten thousand tasks that lm-eval brings before it asks anything."""
    out = tmp_path_factory.mktemp("out")
    names = [word for name in ("choose", "write", "last", "read") for word in ("--lm-eval", name)]
    chat = f"model=tiny,base_url={server.url}/v1/chat/completions,num_concurrent=2,max_retries=1"
    commands = [
        ["weft", "eval", "--url", f"{server.url}/v1", "--tokenizer", str(trained.parent), "--include", str(tasks),
         *names, "--out", str(out / "scores.json")],
        ["lm_eval", "run", "--model", "local-chat-completions", "--model_args", chat, "--tasks", "chat",
         "--include_path", str(tasks), "--apply_chat_template", "--log_samples", "--output_path", str(out / "chat")],
    ]  # fmt: skip
    environment = os.environ | ALONE
    started = [
        subprocess.Popen([sys.executable, "-m", *words], env=environment, stdout=PIPE, stderr=STDOUT, text=True)
        for words in commands
    ]
    for process in started:
        said, _ = process.communicate()
        assert process.returncode == 0, said
    return out / "scores.json", out / "chat"


@pytest.mark.slow
def test_lm_eval_scores_what_weft_eval_scores(
    runs: tuple[Path, Path], trained: Path, tasks: Path, tmp_path: Path
) -> None:
    theirs = {
        (one["what"].removeprefix("lm-eval "), one["metric"]): one["value"]
        for one in json.loads(runs[0].read_text())["tasks"]
    }
    ours = scores(trained, tasks, tmp_path / "ours.json")
    assert theirs["choose", "acc"] == ours["choices", "accuracy"]
    assert theirs["choose", "acc_norm"] == ours["choices", "accuracy by length"]
    assert theirs["write", "exact_match"] == ours["generate", "exact"]
    assert theirs["choose", "acc"] == pytest.approx(4 / 6)
    here = LocalModel(trained, "cpu", "float32")
    found = dict(here.likelihoods([(row["text"], row["label"]) for row in rows()]))
    mean = sum(one.logprob for one in found.values()) / len(found)
    assert theirs["last", "perplexity"] == pytest.approx(math.exp(-mean), rel=1e-4)
    assert theirs["last", "acc"] == sum(one.greedy for one in found.values()) / len(found)
    ids = [here.engine.eos[0], *here.encode(text())]  # what lm-eval puts before the first token
    foreseen = perplexity("text", ids, len(text().encode()), here)
    assert (len(ids) - 1) % foreseen.stride == 0
    assert len(ids) > 2 * foreseen.window
    assert theirs["read", "bits_per_byte"] == pytest.approx(foreseen.bits_per_byte, rel=1e-4)
    here.close()


def test_another_tokenizer_is_refused(server: Served, trained: Path, tmp_path: Path) -> None:
    other = Tokenizer.from_file(str(trained / "tokenizer.json"))
    other.normalizer = normalizers.Lowercase()
    other.save(str(tmp_path / "tokenizer.json"))
    words = ["eval", "--url", f"{server.url}/v1", "--tokenizer", str(tmp_path), "--lm-eval", "choose"]
    refused = CliRunner().invoke(app, words)
    assert "is not the one of the served model" in str(refused.exception)


def scores(trained: Path, tasks: Path, out: Path) -> dict[tuple[str, str], float]:
    """What `weft eval` finds in this process."""
    words = ["eval", str(trained), "--device", "cpu", "--dtype", "float32", "--out", str(out)]
    done = CliRunner().invoke(
        app, [*words, "--task", str(tasks / "choices.toml"), "--task", str(tasks / "generate.toml")]
    )
    assert done.exit_code == 0, done.output
    return {(one["what"], one["metric"]): one["value"] for one in json.loads(out.read_text())["tasks"]}


@pytest.mark.slow
def test_lm_eval_chats(server: Served, runs: tuple[Path, Path]) -> None:
    """`local-chat-completions`: what it was told is what the server tells others."""
    [samples] = runs[1].rglob("samples_chat_*.jsonl")
    told = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(told) == len(rows())
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    for sample in told:
        turn: Any = {"role": "user", "content": sample["doc"]["text"]}
        answer = client.chat.completions.create(model="tiny", messages=[turn], max_tokens=6, temperature=0, stop=["\n"])
        assert sample["resps"] == [[answer.choices[0].message.content]]
