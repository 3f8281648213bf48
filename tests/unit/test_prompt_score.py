"""Prompts and tasks scored, compared and searched, with a model that knows its answers by rule."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prompt_models import Parity
from tokenizers import Tokenizer, models, pre_tokenizers

from weft.prompt.compare import Price, against, compare, record
from weft.prompt.file import OutputCheck, Prompt, PromptSampling, Row
from weft.prompt.harness import ask_server, check_samples, measures, run_lm_eval
from weft.prompt.perplexity import perplexity, read_tokens, windows
from weft.prompt.score import score
from weft.prompt.search import halve, most_candidates, rounds, search, split
from weft.prompt.task import TaskFile, check_task, choices_of, read_task, run_task

ROWS: list[Row] = [{"n": number, "label": "odd" if number % 2 else "even"} for number in range(1, 61)]
BASE = Prompt(name="parity", instruction="Say even or odd.", question="Number {{ n }} :", answer=" {{ label }}")
TOLD = BASE.model_copy(update={"instruction": "Look at the last digit."})


# -- comparing --------------------------------------------------------------------------------------------------------


def test_a_prompt_is_scored_row_by_row() -> None:
    scored = score(BASE, ROWS, Parity())
    assert scored.right == tuple(number % 2 == 0 for number in range(1, 61))
    assert scored.labels[:2] == ("odd", "even")
    assert (scored.prompt_tokens, scored.new_tokens) == (600, 60)


def test_prompts_are_compared_on_the_same_rows() -> None:
    base, told = compare([BASE, TOLD], ROWS, Parity())
    difference, low, high = against(base, told)
    assert (base.accuracy, told.accuracy, difference) == (0.5, 1.0, 0.5)
    assert 0.35 < low < 0.5 < high < 0.65
    kept = json.loads(json.dumps(record([base, told], ROWS, Parity(), Price(2.0, 10.0))))
    assert kept["prompts"][1]["price"] == pytest.approx((600 * 2 + 60 * 10) / 1e6)
    assert [it["right"] for it in kept["prompts"][0]["answers"]] == list(base.right)
    with pytest.raises(ValueError, match="stands twice"):
        compare([BASE, BASE], ROWS, Parity())


def test_malformed_answers_are_wrong_and_counted() -> None:
    strict = TOLD.model_copy(update={"output": OutputCheck(regex=" even")})
    scored = score(strict.model_copy(update={"label": "{{ label }}"}), ROWS, Parity())
    assert sum(it.malformed for it in scored.answers) == 30
    assert sum(scored.right) == 30


def test_a_label_that_is_missing_is_told_before_anything_is_asked() -> None:
    model = Parity()
    with pytest.raises(ValueError, match="'label' is undefined"):
        score(BASE, [*ROWS, {"n": 1}], model)
    assert not model.asked


def test_a_label_that_is_no_choice_is_told_before_anything_is_asked() -> None:
    """It would be wrong whatever the model said."""
    model = Parity()
    one = BASE.model_copy(update={"output": OutputCheck(choices=("odd", "even"))})
    rows = [*ROWS, {"n": 61, "label": "neither"}]
    with pytest.raises(ValueError, match=r"right answer is 'neither', which no answer of .*choices \('odd', 'even'\)"):
        score(one, rows, model)
    assert not model.asked
    score(one, ROWS, model)
    loose = BASE.model_copy(update={"output": OutputCheck(choices=("Odd", "Even."), match="loose")})
    assert len(score(loose, ROWS, model).labels) == len(ROWS)
    read = OutputCheck(choices=("so it is odd", "so it is even"), pattern="is (\\w+)")
    score(BASE.model_copy(update={"output": read, "label": "{{ label }}"}), ROWS, model)


def test_the_last_prompt_is_looked_at_before_the_first_is_asked() -> None:
    model = Parity()
    for broken, said in (("{{ m }}", "'m' is undefined"), ("{% if %}", "instruction, line 1")):
        wrong = BASE.model_copy(update={"instruction": broken})
        with pytest.raises(ValueError, match=said):
            compare([BASE, TOLD, wrong], ROWS, model)
    wrong = BASE.model_copy(update={"examples": ({"n": 2, "label": "even"}, {"n": 3})})
    with pytest.raises(ValueError, match="'label' is undefined"):
        compare([BASE, wrong], ROWS, model)
    assert not model.asked


# -- searching --------------------------------------------------------------------------------------------------------


def test_a_search_finds_the_better_instruction_and_never_peeks() -> None:
    model, given = Parity(), ["Guess.", "Look at the last digit.", "Be quick."]
    held = {f"Number {row['n']} :" for row in split(ROWS, (), 0).held}
    seen: list[int] = []
    found = search(
        BASE, ROWS, model, budget=400, instructions=given,
        progress=lambda what, done, total: seen.append(len(model.asked)) if what == "rounds" else None,
    )  # fmt: skip
    assert found.best.prompt.instruction == "Look at the last digit."
    assert (found.best.prompt.version, found.best.prompt.parent) == (2, BASE.id)
    assert found.best.accuracy == 1
    assert found.gain[1] > 0
    assert found.asked == len(model.asked) <= 400
    asked = [prompt.split("\n\n")[-1] for prompt in model.asked]
    assert not held & set(asked[: seen[-1]])  # before the choice was made
    assert set(asked[seen[-1] :]) == held
    assert len(set(model.asked)) == len(model.asked)


def test_examples_and_proposed_instructions_compete_as_well() -> None:
    found = search(BASE, ROWS, Parity(), budget=400, shots=(0, 3))
    assert len(found.best.prompt.examples) == 3
    assert found.best.accuracy == 1
    model = Parity()
    proposed = search(BASE, ROWS, model, budget=400, proposals=3)
    assert {one.prompt.instruction for one in proposed.candidates} == {
        "Say even or odd.", "Look at the last digit.", "Guess this ."
    }  # fmt: skip
    assert proposed.best.prompt.instruction == "Look at the last digit."


def test_nothing_better_is_said_so() -> None:
    found = search(TOLD, ROWS, Parity(), budget=300, instructions=["Guess.", "Hm."])
    assert found.best is found.base
    assert found.gain == (0, 0, 0)


def test_votes_are_paid_for() -> None:
    voting = BASE.model_copy(update={"output": OutputCheck(votes=3), "sampling": PromptSampling(temperature=1)})
    model = Parity()
    found = search(voting, ROWS, model, budget=400, instructions=["Look at the last digit."])
    assert found.asked == 3 * len(model.asked) <= 400


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget": 30, "instructions": ["x"]}, "--budget 30: at least 52 questions"),
        ({"budget": 99, "instructions": ["x", "y", "z"]}, "--budget 99: 3 instructions can compete, and there are 4"),
        ({"budget": 400}, "nothing to try"),
        ({"budget": 400, "instructions": ["Say even or odd."]}, "nothing to try"),
    ],
)
def test_what_cannot_be_searched_is_told(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        search(BASE, ROWS, Parity(), **settings)  # type: ignore[arg-type]
    for rows, shots, needed in ((20, [], 29), (20, [2], 31), (60, [50], 74)):
        with pytest.raises(ValueError, match=f"{rows} rows are too few to choose by .* this search needs {needed}, "):
            search(BASE, ROWS[:rows], Parity(), budget=400, instructions=["x"], shots=shots)
        assert len(split([*ROWS, *ROWS][:needed], shots, 0).held) == 8


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"instructions": ["Guess.", "Look at {{ this }}."]}, "'this' is undefined"),
        ({"instructions": ["Guess.", "{% if %}"], "proposals": 2}, "instruction, line 1"),
        (
            {"shots": (2,), "prompt": BASE.model_copy(update={"answer": " {{ why }}", "label": "{{ label }}"})},
            "'why' is",
        ),
    ],
)
def test_a_broken_instruction_is_told_before_anything_is_asked(settings: dict[str, Any], said: str) -> None:
    model = Parity()
    with pytest.raises(ValueError, match=said):
        search(**{"prompt": BASE, "rows": ROWS, "model": model, "budget": 400, **settings})
    assert not model.asked


@pytest.mark.parametrize("budget", [64, 100, 1000, 5000])
@pytest.mark.parametrize("count", [2, 5, 16])
def test_halving_stays_within_its_budget(budget: int, count: int) -> None:
    prompts = [BASE.model_copy(update={"instruction": f"{number}"}) for number in range(count)]
    ranking, asked = halve(prompts, ROWS, Parity(), budget)
    assert asked <= budget
    assert sorted(one.prompt.instruction for one in ranking) == sorted(str(number) for number in range(count))
    assert most_candidates(8 * count * rounds(count)) >= count


# -- tasks ------------------------------------------------------------------------------------------------------------


def save_task(folder: Path, text: str) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (folder / "task.toml").write_text(text, encoding="utf-8")
    return folder / "task.toml"


PROMPT = '[prompt]\nquestion = "Number {{ n }} :"\nanswer = " {{ label }}"\n'


def test_tasks_are_scored_with_standard_errors(tmp_path: Path) -> None:
    task = read_task(save_task(tmp_path, f'name = "parity"\ndata = "rows.jsonl"\n{PROMPT}'))
    [one] = run_task(task, Parity())
    assert (one.value, one.count) == (0.5, 60)
    assert one.error == pytest.approx(math.sqrt(0.25 / 59))
    text = f'name = "parity"\nkind = "choices"\nchoices = ["even", "odd"]\ndata = "rows.jsonl"\n{PROMPT}'
    plain, by_length = run_task(read_task(save_task(tmp_path, text)), Parity(), limit=10)
    assert (plain.value, plain.count) == (1, 10)
    assert by_length.value == 0.5  # where odd is right, -1 / 4 is less than -1.2 / 5


def test_choices_may_be_a_rows_own() -> None:
    task = '{"name": "t", "data": "d", "prompt": "p", "kind": "choices", "choices": "options"}'
    read = TaskFile.model_validate_json(task)
    assert choices_of(read, {"options": ["a", "b"], "label": "b"}) == (["a", "b"], 1)
    assert choices_of(read, {"options": ["a", "b"], "label": 0}) == (["a", "b"], 0)
    with pytest.raises(ValueError, match="label = 'c' is none of the choices a, b"):
        choices_of(read, {"options": ["a", "b"], "label": "c"})
    with pytest.raises(ValueError, match="'options' must list at least two choices; it is None"):
        choices_of(read, {"label": "c"})
    own = TaskFile(name="t", data="d", prompt="p", kind="choices", choices=("a",))
    with pytest.raises(ValueError, match=r"task t: choices must list at least two choices; it is \('a',\)"):
        choices_of(own, {"label": "a"})


def test_an_empty_choice_is_told_by_its_name(tmp_path: Path) -> None:
    prompt = '[prompt]\nquestion = "{{ n }}"\nanswer = "{{ label }}"\n'
    text = f'name = "t"\nkind = "choices"\nchoices = ["even", "odd", ""]\ndata = "rows.jsonl"\n{prompt}'
    with pytest.raises(ValueError, match="task t: the choice '' is an empty text"):
        run_task(read_task(save_task(tmp_path, text)), Parity())


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ('[prompt.output]\nchoices = ["even", "odd"]\n', {"n": 61, "label": "none"}, "right answer is 'none', which"),
        ("", {"label": "even"}, "'n' is undefined"),
        (
            'kind = "choices"\nchoices = ["even", "odd"]\n',
            {"n": 61, "label": "none"},
            "is none of the choices even, odd",
        ),
        ('kind = "choices"\nchoices = ["even", "odd"]\n', {"label": "odd"}, "'n' is undefined"),
    ],
)
def test_a_task_is_looked_at_before_anything_is_asked(kind: str, row: Row, said: str, tmp_path: Path) -> None:
    head, form = (kind, "") if "kind" in kind else ("", kind)
    task = read_task(save_task(tmp_path, f'name = "parity"\ndata = "rows.jsonl"\n{head}{PROMPT}{form}'))
    check_task(task)
    broken = replace(task, rows=[*task.rows, row])
    check_task(broken, limit=60)
    with pytest.raises(ValueError, match=said):
        check_task(broken)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f'name = "t"\ndata = "none.jsonl"\n{PROMPT}', "there is no file"),
        (f'name = "t"\ndata = "rows.jsonl"\nkind = "choices"\n{PROMPT}', "set them where kind"),
        ('name = "t"\ndata = "rows.jsonl"\nprompt = "none.toml"\n', "there is no config file"),
        (
            'name = "t"\ndata = "rows.jsonl"\nkind = "choices"\nchoices = ["a", "b"]\n[prompt]\nquestion = "q"\n',
            "compared by the probability of `answer`",
        ),
        (f'name = "t"\ndata = "rows.jsonl"\nmetric = "f1"\n{PROMPT}', "unknown setting 'metric'"),
    ],
)
def test_what_is_no_task_is_told(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        read_task(save_task(tmp_path, text))


# -- perplexity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 9, 10, 11, 57])
@pytest.mark.parametrize("stride", [1, 4, 9])
def test_every_token_but_the_first_counts_once(count: int, stride: int) -> None:
    cuts = windows(count, 10, stride)
    assert [token for _, fresh, stop in cuts for token in range(fresh, stop)] == list(range(1, count))
    assert all(stop - start <= 10 and start < fresh for start, fresh, stop in cuts)
    assert all(fresh - start >= 10 - stride for start, fresh, _ in cuts[1:])


def test_perplexity_is_of_the_tokens_that_count() -> None:
    ids = list(range(30))
    found = perplexity("t", ids, 60, Parity(), window=10, stride=5)
    assert found.tokens == 29
    assert found.nats == pytest.approx(sum(ids) / 29)
    assert found.bits_per_byte == pytest.approx(sum(ids) / math.log(2) / 60)
    assert found.error > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ids": [1]}, "two are needed"), ({"ids": [1, 2], "window": 101}, "from 2 to 100"),
        ({"ids": [1, 2], "window": 10, "stride": 10}, "from 1 to 9"),
    ],
)  # fmt: skip
def test_windows_that_cannot_be_are_told(settings: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        perplexity("t", num_bytes=0, model=Parity(), **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no text file"):
        read_tokens(tmp_path / "none.txt", Parity())
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        read_tokens(tmp_path / "binary", Parity())


# -- lm-eval ----------------------------------------------------------------------------------------------------------


def test_lm_evals_scores_are_taken_with_their_errors() -> None:
    results = {
        "results": {"mc": {"alias": "mc", "acc,none": 0.75, "acc_stderr,none": 0.1, "perplexity,none": 3.0}},
        "n-samples": {"mc": {"original": 9, "effective": 4}},
    }
    first, second = measures(results)
    assert (first.what, first.metric, first.value, first.error, first.count) == ("lm-eval mc", "acc", 0.75, 0.1, 4)
    assert math.isnan(second.error)


def test_scores_that_a_wrong_tokenizer_gave_are_not_told(tmp_path: Path) -> None:
    sample = {"arguments": {"gen_args_0": {}}, "resps": [[[0.0, True]], [[0.0, True]]]}
    (tmp_path / "samples_mc.jsonl").write_text(json.dumps(sample) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="is not the one of the served model"):
        check_samples(tmp_path)
    sample["resps"] = [[[-1.0, True]], [[0.0, True]]]
    (tmp_path / "samples_mc.jsonl").write_text(json.dumps(sample) + "\n", encoding="utf-8")
    check_samples(tmp_path)


def test_a_servers_tokenizer_is_held_against_the_one_that_is_named(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"[?]": 0, "The": 1, "quick": 2}, "[?]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))

    class Server:
        longest = 63

        def encode(self, text: str) -> list[int]:
            return words.encode(text).ids

    class Silent(Server):
        def encode(self, text: str) -> list[int]:
            raise ValueError("404")

    class Another(Server):
        def encode(self, text: str) -> list[int]:
            return words.encode(text).ids[::-1]

    asked: list[Any] = [Server(), Silent(), Another()]
    assert [ask_server(tmp_path, one) for one in asked[:2]] == [63, None]
    with pytest.raises(ValueError, match="is not the one of the served model: it makes other tokens of a text"):
        ask_server(tmp_path, asked[2])


def test_lm_eval_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.prompt.harness.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'weft\[lm-eval\]'"):
        run_lm_eval(["mc"], "http://127.0.0.1:1/v1", "m", Path("tok"))
    monkeypatch.setattr("weft.prompt.harness.importlib.util.find_spec", lambda name: name)
    with pytest.raises(ValueError, match=r"there is no tokenizer\.json"):
        run_lm_eval(["mc"], "http://127.0.0.1:1/v1", "m", Path("tok"))
