"""The options that a shell script gives to the training it starts. Of what is in the script nothing is run. Torch-free.

Assignments, conditions, cases, loops and functions are gone through as the shell does. What a condition asks that the
script does not say — a file, a program's output, a word of the command line — is not decided: its branches are all gone
through, and what they set otherwise than each other has no value, but a name. A name that nobody sets is empty where a
condition asks for it, as it is in the shell.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from weft.plan.emit.shell_tree import parse
from weft.plan.emit.shell_walk import Walk
from weft.plan.emit.shell_words import is_unset

Options = dict[str, list[str]]
YAML = re.compile(r"^[ \t]*(--[\w-]+):[ \t]+(.*?)(?:[ \t]+#.*)?$", re.MULTILINE)


def one(there: Options, name: str, kind: Callable[[str], Any]) -> Any:
    """Take an option's value away.

    Raises:
        ValueError: it is none of its kind.
    """
    values = there.pop(name)
    try:
        [value] = values[:1]
        return kind(value)
    except ValueError:
        why = "a number has to follow"
        if is_unset(" ".join(values[:1])):
            why = (
                "the file does not say it. Add, behind the file's name, what the script is started with, or NAME=VALUE"
            )
        raise ValueError(f"{name} {' '.join(values)}: {why}") from None


def read_script(text: str, given: Sequence[str] = ()) -> tuple[str, Options, list[str]]:
    """The program, if it is one in Python, its options, and what could not be gone through.

    Args:
        given: what the script is started with, and what its environment has, as NAME=VALUE.

    Raises:
        ValueError: it is no script.
    """
    walk = Walk(given)
    walk.run(parse(_of_yaml(text) or text))
    trainings = [words for words in ([*_words(walk, command)] for command in walk.commands) if _is_training(words)]
    found = [_options(words) for words in trainings]
    if found and any(other != found[-1] for other in found):
        walk.remarks.append(f"the first {len(found) - 1} of {len(found)} trainings that the file starts")
    everything = [*walk.values(), *(word for command in walk.commands for word in command)]
    options = found[-1] if found else _options([*_words(walk, everything)])
    programs = [word for words in trainings[-1:] for word in words if word.endswith(".py")]
    told = {name: [_asked(value, walk.depends) for value in values] for name, values in options.items()}
    return (programs or [""])[0], told, walk.remarks


def _of_yaml(text: str) -> str:
    """The arguments in a model_config.yaml of Megatron-LM's tests, a key each: a switch is true."""
    if "MODEL_ARGS:" not in text:
        return ""
    found = [(name, value.strip("\"' \t\r")) for name, value in YAML.findall(text)]
    return " ".join(
        name if value == "true" else f"{name} {shlex.quote(value)}" for name, value in found if value != "false"
    )


def _asked(value: str, depends: Mapping[str, str]) -> str:
    """With the condition that was not decided, where the value depends on one."""
    asked = [depends[name] for name in re.findall(r"\$(\w+)", value) if name in depends]
    return f"{value} (it depends on: {asked[0]})" if asked else value


def _is_training(words: list[str]) -> bool:
    return any(word.partition("=")[0] in ("--num-layers", "--num_layers") for word in words)


def _words(walk: Walk, words: Sequence[str]) -> Iterator[str]:
    """A string may be a command that another shell runs, or an option and its value."""
    for word in words:
        if re.search(r"--[\w-]+\s|\s--\w", word):
            yield from walk.split(walk.filled(word))
        else:
            yield word


def _options(words: list[str]) -> Options:
    found: Options = {}
    values: list[str] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            values = found[name if is_unset(name) else name.replace("_", "-")] = [value] if equals else []
        elif re.search(r"\.py$|^-[a-zA-Z]$", word):  # a program, or an option of the launcher's
            values = []
        else:
            values.append(word)
    return found
