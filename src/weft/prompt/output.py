"""What comes back from a model: whether it has its form, what of it is the answer, and whether that is right."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from weft.prompt.file import OutputCheck, Prompt, Row
from weft.prompt.model import Form
from weft.prompt.render import render

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")


def form_of(output: OutputCheck) -> Form | None:
    """The form that an answer is held to, for a model that can be."""
    if output.json_schema is not None:
        return Form("json_schema", json.dumps(output.json_schema))
    if output.choices:
        return Form("regex", f" ?({'|'.join(map(literal, output.choices))})")
    return Form("regex", output.regex) if output.regex else None


def literal(text: str) -> str:
    """A regular expression that only this text matches."""
    return re.sub(r"([\\.+*?()|\[\]{}^$])", r"\\\1", text)


def problem(output: OutputCheck, text: str) -> str | None:
    """What is wrong with an answer's form; None: nothing.

    Raises:
        ValueError: the form itself is malformed.
    """
    form = form_of(output)
    if form is None or follows(form, text.strip() if form.kind == "json_schema" else text):
        return "the answer is not where `output` says" if read_answer(output, text) is None else None
    if output.choices:
        return f"it is none of {', '.join(output.choices)}"
    return "it is not JSON of the schema" if form.kind == "json_schema" else f"it does not match {output.regex}"


def follows(form: Form, text: str) -> bool:
    """Whether a text has a form, by the engine that holds models to it: over bytes, it needs no model's tokenizer."""
    found = matcher(form).deep_copy()
    data = list(text.encode())
    return found.try_consume_tokens(data) == len(data) and bool(found.is_accepting())


@lru_cache
def matcher(form: Form) -> Any:
    import llguidance

    makers: dict[str, Any] = {
        "json_schema": llguidance.LLMatcher.grammar_from_json_schema,
        "regex": llguidance.LLMatcher.grammar_from_regex,
    }
    made = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), makers[form.kind](form.source), log_level=0)
    if made.is_error():
        raise ValueError(f"output: the {form.kind} is malformed: {made.get_error().strip().splitlines()[0]}")
    return made


def read_answer(output: OutputCheck, text: str) -> str | None:
    """What of a text is the answer; None: it is not there."""
    if output.pattern:
        try:
            found = list(re.finditer(output.pattern, text))
        except re.error as error:
            raise ValueError(f"output.pattern is no regular expression: {error}") from None
        return (found[-1][1] if found[-1].re.groups else found[-1][0]).strip() if found else None
    if output.field:
        try:
            value = json.loads(text)
        except ValueError:
            return None
        if not isinstance(value, dict) or output.field not in value:
            return None
        found_value = value[output.field]
        return found_value.strip() if isinstance(found_value, str) else json.dumps(found_value)
    return text.strip()


def settle(output: OutputCheck, texts: Sequence[str]) -> str | None:
    """The answer of several samples (self-consistency, Wang et al., 2022): the most frequent, of equals the first.
    Samples without the right form have no vote; None: none has."""
    answers = [read_answer(output, text) for text in texts if problem(output, text) is None]
    counts = Counter(answer for answer in answers if answer is not None)
    return counts.most_common(1)[0][0] if counts else None


def label_of(prompt: Prompt, row: Row) -> str:
    """The right answer to a row: `label`, or what would be read out of the text that `answer` makes of it.

    Raises:
        ValueError: the prompt has neither, nothing can be read out, or no answer that `output` allows would be right.
    """
    label = render(prompt, "label", row).strip() if prompt.label else _answer_of(prompt, row)
    allowed = [read_answer(prompt.output, choice) for choice in prompt.output.choices]
    if allowed and not any(is_right(prompt.output, answer, label) for answer in allowed):
        raise ValueError(
            f"prompt {prompt.name}: a row's right answer is {label!r}, which no answer of output.choices "
            f"({', '.join(map(repr, prompt.output.choices))}) can be: add it there, or leave such rows out"
        )
    return label


def _answer_of(prompt: Prompt, row: Row) -> str:
    if not prompt.answer:
        raise ValueError(
            f"prompt {prompt.name}: nothing says what the right answer is; set label, such as '{{{{ label }}}}'"
        )
    text = render(prompt, "answer", row)
    found = read_answer(prompt.output, text)
    if found is None:
        raise ValueError(f"prompt {prompt.name}: no answer can be read out of its own {text!r}; set label")
    return found


def is_right(output: OutputCheck, answer: str | None, label: str) -> bool:
    """exact: the same text. loose: but for case, punctuation and spaces. number: the answer's last number is the label's.
    contains: the label stands in it, whatever the case."""
    if answer is None:
        return False
    match output.match:
        case "exact":
            return answer == label
        case "loose":
            return plain(answer) == plain(label)
        case "contains":
            return label.casefold() in answer.casefold()
        case "number":
            mine, right = last_number(answer), last_number(label)
            return mine is not None and mine == right


def plain(text: str) -> str:
    return " ".join(text.casefold().translate(str.maketrans("", "", string.punctuation)).split())


def last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
