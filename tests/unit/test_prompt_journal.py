"""Commands that break off go on: what was answered is in a file, and is asked no second time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path

import pytest
from prompt_models import Parity

from weft.prompt.compare import compare
from weft.prompt.file import Prompt, PromptSampling, Row
from weft.prompt.journal import Journal
from weft.prompt.model import Ask, Reply
from weft.prompt.open import kept
from weft.prompt.search import search

ROWS: list[Row] = [{"n": number, "label": "odd" if number % 2 else "even"} for number in range(1, 61)]
BASE = Prompt(name="parity", instruction="Say even or odd.", question="Number {{ n }} :", answer=" {{ label }}")
TOLD = BASE.model_copy(update={"instruction": "Look at the last digit."})


class Dying(Parity):
    """Answers so many, and no more."""

    def __init__(self, answers: int) -> None:
        super().__init__()
        self.left = answers

    def complete(self, asks: Sequence[Ask], keep: bool = False) -> Iterator[tuple[int, Reply]]:
        for one in super().complete(asks, keep):
            if not self.left:
                self.asked.pop()
                raise ValueError("nobody answers")
            self.left -= 1
            yield one


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.json.part"


def test_a_comparison_goes_on(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = compare([BASE, TOLD], ROWS, Parity())
    first, then = Dying(75), Parity()
    with pytest.raises(ValueError, match="nobody answers"), kept(Journal(first, path, ["m"])) as broken:
        compare([BASE, TOLD], ROWS, broken)
    assert f"75 answers are kept in {path}: the same command goes on" in capsys.readouterr().err
    with kept(Journal(then, path, ["m"])) as journal:
        gone_on = compare([BASE, TOLD], ROWS, journal)
    assert f"75 answers were taken over from {path}" in capsys.readouterr().err
    assert sorted(first.asked + then.asked) == sorted(set(first.asked + then.asked))
    assert [(it.answers, it.right) for it in gone_on] == [(it.answers, it.right) for it in whole]
    assert not path.exists()


def test_nothing_is_left_of_nothing(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="nobody answers"), kept(Journal(Dying(0), path, ["m"])) as broken:
        compare([BASE, TOLD], ROWS, broken)
    assert not path.exists()
    assert not capsys.readouterr().err


@pytest.mark.parametrize("answers", [0, 1, 30, 100])
def test_a_search_goes_on_as_it_would_have(answers: int, path: Path) -> None:
    """Its budget and its choice are those of a search that nobody broke off, whatever it had already got."""
    settings = {"budget": 300, "proposals": 3, "shots": (2,)}
    calm, then = Parity(), Parity()
    whole = search(BASE, ROWS, calm, **settings)  # type: ignore[arg-type]
    dying = Dying(answers)
    with pytest.raises(ValueError, match="nobody answers"), kept(Journal(dying, path, ["m"])) as broken:
        search(BASE, ROWS, broken, **settings)  # type: ignore[arg-type]
    with kept(Journal(then, path, ["m"])) as journal:
        found = search(BASE, ROWS, journal, **settings)  # type: ignore[arg-type]
    assert (found.asked, found.candidates) == (whole.asked, whole.candidates)
    assert (found.base.answers, found.best.answers) == (whole.base.answers, whole.best.answers)
    assert (journal.taken, len(dying.asked) + len(then.asked)) == (answers, len(calm.asked))


def test_likelihoods_and_texts_are_kept_as_well(path: Path) -> None:
    texts, ids = [("Number 1 :", " odd"), ("Number 2 :", " odd")], [[1, 2], [3, 4, 5]]
    first, then = Journal(Parity(), path, ["m"]), Parity()
    told = dict(first.likelihoods(texts[:1])), dict(first.logprobs(ids))
    again = Journal(then, path, ["m"])
    likelihoods = dict(again.likelihoods(texts))
    assert (likelihoods[0], len(likelihoods), len(then.asked)) == (told[0][0], 2, 1)
    assert dict(again.logprobs(ids)) == told[1]
    assert again.taken == 3


def test_answers_of_another_model_or_to_another_question_are_not_taken(path: Path) -> None:
    plain = Ask("Number 3 :", PromptSampling())
    list(Journal(Parity(), path, ["a"]).complete([plain, plain]))
    warm, many = Ask("Number 3 :", PromptSampling(temperature=1.0)), Ask("Number 3 :", PromptSampling(), n=2)
    other = Journal(Parity(), path, ["b"])
    list(other.complete([plain]))
    mine = Journal(Parity(), path, ["a"])
    list(mine.complete([warm, many]))
    assert (other.taken, mine.taken) == (0, 0)
    list(mine.complete([plain] * 3))  # of the same ask each answer is given once
    assert mine.taken == 2


def test_what_a_kill_cut_off_is_asked_again(path: Path) -> None:
    asks = [Ask(f"Number {number} :", PromptSampling()) for number in range(4)]
    told = dict(Journal(Parity(), path, ["m"]).complete(asks))
    path.write_bytes(path.read_bytes()[:-9])
    for taken in (3, 4):
        journal = Journal(Parity(), path, ["m"])
        assert {index: astuple(it) for index, it in journal.complete(asks)} == {
            at: astuple(it) for at, it in told.items()
        }
        assert journal.taken == taken


def test_a_refusal_says_among_how_many(path: Path) -> None:
    asks = [Ask(f"Number {number} :", PromptSampling()) for number in range(4)]
    list(Journal(Parity(), path, ["m"]).complete(asks[:1]))
    with pytest.raises(ValueError, match="among the 3 of 4 that were not answered before: nobody answers"):
        list(Journal(Dying(1), path, ["m"]).complete(asks))


@pytest.mark.parametrize("text", ["not JSON\n", "[1]\n", '{"asked": "a"}\n'])
def test_a_file_of_somebody_elses_is_not_written_over(text: str, path: Path) -> None:
    path.write_text(text)
    with pytest.raises(ValueError, match=r"out\.json\.part should hold answers .* move it away"):
        Journal(Parity(), path, ["m"])
    assert path.read_text() == text


def test_what_cannot_be_kept_is_told_before_anything_is_asked(tmp_path: Path) -> None:
    model = Parity()
    with pytest.raises(ValueError, match=r"gone/a\.part cannot be written, where answers are kept"):
        list(Journal(model, tmp_path / "gone" / "a.part", ["m"]).complete([Ask("Number 3 :", PromptSampling())]))
    assert not model.asked
