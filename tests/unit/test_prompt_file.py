"""A prompt's file, what is made of it, which examples it shows, and how answers are read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.prompt.candidates import variant
from weft.prompt.examples import Examples, Words
from weft.prompt.file import OutputCheck, Prompt, Shots, read_prompt, read_rows, write_prompt
from weft.prompt.output import form_of, is_right, label_of, problem, read_answer, settle
from weft.prompt.render import as_messages, as_text, render
from weft.prompt.starters import STARTERS
from weft.prompt.statistics import mean_error, paired_bootstrap, ratio_error, wilson

MOOD = Prompt(
    name="mood", instruction="Say the mood.", question="Text: {{ text }}\nMood:", answer=" {{ label }}",
    examples=({"text": "a fine day", "label": "good"}, {"text": "a lost shoe", "label": "bad"}),
)  # fmt: skip


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STARTERS)
def test_what_new_writes_is_a_prompt_that_comes_back_the_same(kind: str, tmp_path: Path) -> None:
    first = tmp_path / "a.toml"
    first.write_text(STARTERS[kind].format(name="a"), encoding="utf-8")
    prompt = read_prompt(first)
    write_prompt(prompt, tmp_path / "b.toml")
    assert read_prompt(tmp_path / "b.toml") == prompt
    assert as_text(prompt, prompt.examples, {"text": "so and so"})


def test_odd_texts_come_back_the_same(tmp_path: Path) -> None:
    odd = MOOD.model_copy(
        update={
            "instruction": 'tab\there, "quoted" \\ é\x7f',
            "examples": ({"text": "a\nb", "list": [1, {"x": True}], "n": 1.5},),
        }
    )
    write_prompt(odd, tmp_path / "odd.toml")
    assert read_prompt(tmp_path / "odd.toml") == odd


def test_a_version_is_never_written_over(tmp_path: Path) -> None:
    write_prompt(MOOD, tmp_path / "mood.toml")
    with pytest.raises(ValueError, match="a version, once written, stays"):
        write_prompt(MOOD, tmp_path / "mood.toml")


def test_what_the_model_sees_is_what_the_digest_tells_apart() -> None:
    assert MOOD.model_copy(update={"version": 7, "about": "…", "name": "x"}).digest == MOOD.digest
    other = variant(MOOD, instruction="What mood?")
    assert (other.version, other.parent) == (2, MOOD.id)
    assert other.digest != MOOD.digest
    assert variant(MOOD, instruction=MOOD.instruction) is MOOD


def test_examples_of_a_file_become_the_prompts_own(tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text('{"text": "rain", "label": "bad"}\n\n', encoding="utf-8")
    (tmp_path / "p.toml").write_text(
        'name = "p"\nquestion = "{{ text }}"\nanswer = "{{ label }}"\n[shots]\nfile = "more.jsonl"\n', encoding="utf-8"
    )
    assert read_prompt(tmp_path / "p.toml").examples == ({"text": "rain", "label": "bad"},)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('name = "p"\n', "setting 'question' is missing"),
        ('name = "p"\nquestion = "q"\ntemplate = ""\n', "unknown setting 'template'"),
        ('name = "p"\nquestion = "q"\nexamples = [{ a = 1 }]\n', "no `answer` says how they are answered"),
        ('name = "p"\nquestion = "q"\n[output]\nvotes = 3\n', "set sampling.temperature"),
        ('name = "p"\nquestion = "q"\n[output]\nregex = "a"\nchoices = ["b"]\n', "three ways to say a form"),
        ('name = "p"\nquestion = "q"\n[output]\npattern = "a"\nfield = "b"\n', "both say where the answer is"),
        ("name = ", "is not TOML"),
    ],
)
def test_what_is_no_prompt_is_told(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        read_prompt(tmp_path / "p.toml")


@pytest.mark.parametrize(
    ("text", "said"), [("", "has no rows"), ('{"a": 1}\n{"a"', "line 2: not JSON"), ("[1]\n", "a row is an object")]
)
def test_what_are_no_rows_is_told(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        read_rows(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="there is no file"):
        read_rows(tmp_path / "none.jsonl")


def test_a_line_ends_where_a_line_of_json_does(tmp_path: Path) -> None:
    """Texts from the web have Unicode's other separators in them, which JSON leaves as they are."""
    rows = [{"text": "one\u2028two\x85three\x0c"}, {"text": "four"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8", newline="")
    assert read_rows(path) == rows
    path.write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(ValueError, match=r"rows\.jsonl is not text in UTF-8"):
        read_rows(path)


# -- templates --------------------------------------------------------------------------------------------------------


def test_a_prompt_as_text_and_as_turns() -> None:
    row = {"text": "{{ 1 + 1 }}"}  # what a row holds is no template
    assert as_text(MOOD, MOOD.examples[:1], row) == (
        "Say the mood.\n\nText: a fine day\nMood: good\n\nText: {{ 1 + 1 }}\nMood:"
    )
    assert as_messages(MOOD, MOOD.examples[:1], row) == (
        {"role": "system", "content": "Say the mood."},
        {"role": "user", "content": "Text: a fine day\nMood:"},
        {"role": "assistant", "content": "good"},
        {"role": "user", "content": "Text: {{ 1 + 1 }}\nMood:"},
    )


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("{{ txt }}", "'txt' is undefined; the row's fields: text"),
        ("{{ text }", "question, line 1"),
        ("{{ text.__class__.__mro__ }}", "may not do this|unsafe"),
        ("{% for i in range(1000000) %}{% endfor %}", "Range too big"),
        ("{{ text.append(1) }}", "has no attribute 'append'"),
        ("{{ text / 2 }}", "unsupported operand"),
    ],
)
def test_what_a_template_cannot_do_is_told(question: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        render(MOOD.model_copy(update={"question": question}), "question", {"text": "x"})


# -- examples ---------------------------------------------------------------------------------------------------------

POOL = tuple(
    {"text": text, "label": "x"}
    for text in (
        "a cat sat on the mat",
        "dogs run in the park",
        "a cat and a dog",
        "stocks fell on monday",
        "rates rose again",
    )
)


def chosen(question: str, **shots: object) -> list[str]:
    prompt = MOOD.model_copy(update={"examples": POOL, "shots": Shots.model_validate(shots)})
    return [row["text"] for row in Examples(prompt).choose(render(prompt, "question", {"text": question}))]


def test_similar_examples_stand_next_to_the_question() -> None:
    assert chosen("the cat on a mat", count=2, select="similar") == ["a cat and a dog", "a cat sat on the mat"]
    assert chosen("rates fell on monday", count=1, select="similar") == ["stocks fell on monday"]


def test_diverse_examples_have_little_in_common() -> None:
    found = chosen("anything", count=3, select="diverse")
    assert len({"cat" in text for text in found}) == 2
    vectors = Words([row["text"] for row in POOL])(found)
    assert (vectors @ vectors.T - np.eye(3)).max() < 0.3


def test_random_examples_go_by_seed_and_question_alone() -> None:
    questions = [f"question {number}" for number in range(8)]
    first = [chosen(question, count=2, select="random") for question in questions]
    assert first == [chosen(question, count=2, select="random") for question in questions[::-1]][::-1]
    assert len({tuple(one) for one in first}) > 3
    assert first != [chosen(question, count=2, select="random", seed=1) for question in questions]


@pytest.mark.parametrize("select", ["first", "random", "similar", "diverse"])
def test_no_example_gives_the_answer_away(select: str) -> None:
    for row in POOL:
        assert row["text"] not in chosen(row["text"], count=4, select=select)
        assert len(chosen(row["text"], count=4, select=select)) == 4


def test_more_examples_than_there_are_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shots.count is 6, but there are 5 examples"):
        chosen("x", count=6)
    with pytest.raises(ValueError, match="a model is needed"):
        chosen("x", count=1, select="similar", by="embeddings")


# -- answers ----------------------------------------------------------------------------------------------------------

JSON = OutputCheck(
    json_schema={"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}, field="n"
)


@pytest.mark.parametrize(
    ("output", "text", "answer", "wrong"),
    [
        (OutputCheck(), " yes\n", "yes", None),
        (OutputCheck(choices=("yes", "c++")), " c++", "c++", None),
        (OutputCheck(choices=("yes", "no")), "maybe", "maybe", "none of yes, no"),
        (OutputCheck(regex=r"\d+"), "12", "12", None),
        (OutputCheck(regex=r"\d+"), "12a", "12a", "does not match"),
        (JSON, ' {"n": 3}\n', "3", None),
        (JSON, '{"n": "three"}', "three", "not JSON of the schema"),
        (JSON, '{"n": 3', None, "not JSON of the schema"),
        (OutputCheck(pattern=r"answer is (\w+)"), "The answer is a. No, the answer is b.", "b", None),
        (OutputCheck(pattern=r"answer is (\w+)"), "I do not know", None, "not where"),
    ],
)
def test_what_is_read_out_of_a_text(output: OutputCheck, text: str, answer: str | None, wrong: str | None) -> None:
    assert read_answer(output, text) == answer
    found = problem(output, text)
    assert found is None if wrong is None else wrong in (found or "")


def test_a_malformed_form_is_told() -> None:
    with pytest.raises(ValueError, match="the regex is malformed"):
        problem(OutputCheck(regex="("), "x")
    with pytest.raises(ValueError, match=r"output.pattern is no regular expression"):
        read_answer(OutputCheck(pattern="("), "x")


@settings(max_examples=40)
@given(st.lists(st.text(min_size=1).filter(lambda text: text.strip() == text), min_size=1, max_size=4))
def test_every_choice_has_the_form_of_the_choices(choices: list[str]) -> None:
    output = OutputCheck(choices=tuple(choices))
    assert form_of(output) is not None
    assert all(problem(output, choice) is None for choice in choices)


def test_the_most_frequent_answer_counts_and_malformed_ones_do_not() -> None:
    output = OutputCheck(pattern=r"is (\w+)")
    assert settle(output, ["it is a", "it is b", "?", "?", "?", "it is b"]) == "b"
    assert settle(output, ["it is a", "it is b"]) == "a"
    assert settle(output, ["?"]) is None


@pytest.mark.parametrize(
    ("match", "answer", "label", "right"),
    [
        ("exact", "Yes", "yes", False), ("loose", "Yes!", "yes", True), ("loose", "yes sir", "yes", False),
        ("contains", "I say Yes", "yes", True), ("number", "about 1,200.0 pens", "1200", True),
        ("number", "12", "13", False), ("number", "none", "0", False), ("exact", None, "yes", False),
    ],
)  # fmt: skip
def test_when_an_answer_is_right(match: str, answer: str | None, label: str, right: bool) -> None:
    assert is_right(OutputCheck.model_validate({"match": match}), answer, label) is right


def test_the_label_is_read_as_answers_are() -> None:
    thought = MOOD.model_copy(
        update={"answer": " Well… so it is {{ label }}.", "output": OutputCheck(pattern=r"it is (\w+)")}
    )
    assert label_of(thought, {"text": "x", "label": "good"}) == "good"
    assert label_of(thought.model_copy(update={"label": "{{ label }}!"}), {"label": "good"}) == "good!"
    with pytest.raises(ValueError, match="nothing says what the right answer is"):
        label_of(Prompt(name="p", question="q"), {})
    with pytest.raises(ValueError, match="no answer can be read out of its own"):
        label_of(thought.model_copy(update={"answer": "{{ label }}"}), {"label": "good"})


# -- statistics -------------------------------------------------------------------------------------------------------


def test_intervals_are_the_published_ones() -> None:
    # 81 of 263, 15 of 148 and 0 of 20: Newcombe, Statistics in Medicine 17 (1998), table I
    for right, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(right, count) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_a_wilson_interval_holds_the_truth_as_often_as_it_says() -> None:
    numbers = np.random.default_rng(0)
    for share in (0.05, 0.3, 0.9):
        inside = [wilson(int(numbers.binomial(60, share)), 60) for _ in range(2000)]
        assert np.mean([low <= share <= high for low, high in inside]) == pytest.approx(0.95, abs=0.025)


def test_the_paired_bootstrap_sees_what_pairs_have_in_common() -> None:
    numbers = np.random.default_rng(0)
    hard = numbers.random(400)
    a, b = (hard < 0.6).tolist(), (hard < 0.66).tolist()  # b is right wherever a is, and a little more often
    difference, low, high = paired_bootstrap(a, b)
    assert difference == pytest.approx(np.mean(b) - np.mean(a))
    assert 0 < low < difference < high
    expected = np.std(np.array(b, float) - np.array(a, float)) / math.sqrt(400) * 1.96
    assert (high - low) / 2 == pytest.approx(expected, rel=0.1)
    assert paired_bootstrap(a, a) == (0, 0, 0)


def test_standard_errors() -> None:
    assert mean_error([1, 0, 1, 1]) == (0.75, pytest.approx(0.25))
    assert math.isnan(mean_error([1.0])[1])
    ratio, error = ratio_error([2, 4, 9], [1, 2, 3])
    assert ratio == 2.5
    assert error == pytest.approx(math.sqrt(1.5 * (0.5**2 + 1**2 + 1.5**2)) / 6)
