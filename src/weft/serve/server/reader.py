"""An answer as it comes, parted into what it thinks, what it says and what it calls. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from weft.serve.requests.tokens import begun
from weft.serve.server.ways import Objects, Way, Written, skip
from weft.serve.server.words import any_of

THINK, THOUGHT = "<think>", "</think>"
"""Around what a model thinks before it answers (DeepSeek-R1, Qwen3)."""


@dataclass
class Part:
    """What came: what is thought, what is said, and calls that are whole."""

    thought: str = ""
    said: str = ""
    calls: list[Written] = field(default_factory=list)


class AnswerReader:
    """
    Args:
        thoughts: None: the model does not think.
        calls: None: it calls nothing.
        hidden: special tokens that are in the text for the sake of calls, and are not told.
    """

    def __init__(
        self, thoughts: ThoughtReader | None = None, calls: CallReader | None = None, hidden: Sequence[str] = ()
    ) -> None:
        self._thoughts, self._calls = thoughts, calls
        self._hidden = any_of(tuple(hidden))

    def push(self, text: str, whole: bool = False) -> Part:
        """
        Args:
            whole: no more comes.
        """
        part = Part(said=text)
        if self._thoughts:
            part.thought, part.said = self._thoughts.push(text, whole)
        if self._calls:
            part.said, part.calls = self._calls.push(part.said, whole)
        part.thought, part.said = self._hidden.sub("", part.thought), self._hidden.sub("", part.said)
        return part


class CallReader:
    """Finds calls. Space around them is not said.

    Args:
        names: functions that there are: a call of any other one is only said.
    """

    def __init__(self, way: Way, names: Collection[str]) -> None:
        self.way, self.names = way, frozenset(names)
        self._held = self._space = ""  # what may be a call yet; the space that the answer begins with
        self._state = self._say_on
        self._has_said = self._whole = False
        self._said, self._made = "", list[Written]()

    def push(self, text: str, whole: bool = False) -> tuple[str, list[Written]]:
        """What is sure to be said with this text, and the calls that it completes."""
        self._held, self._whole = self._held + text, whole
        self._said, self._made = "", []
        while self._held and self._state():
            pass
        space, self._space = (self._space, "") if whole else ("", self._space)
        return space + self._said, self._made

    # -- states: each takes of what is held, and is False where it needs more ---------------------------------------------

    def _say_on(self) -> bool:
        held, marks = self._held, self.way.marks
        if not marks:
            begins = not self._has_said and held.lstrip()[:1] in ("{", "[", "")
            if begins and (held.strip() or not self._whole):
                self._state = self._call
                return bool(held.strip())
            self._say(len(held))
            return False
        places = [at for mark in marks if (at := held.find(mark)) >= 0]
        if places:
            self._say(min(places))
            self._state = self._call
            return True
        self._say(len(held) - (0 if self._whole else max(begun(held, mark) for mark in marks)))
        return False

    def _call(self) -> bool:
        found = self.way.take(self._held, self._whole)
        if found is None:
            return False
        calls, size = found
        if calls and all(name in self.names for name, _ in calls):
            self._made += calls
            self._held, self._space = self._held[size:], ""
            self._state = self._follow
        else:  # it only looked like one
            self._say(max(1, skip(self._held, self.way.marks)))
            self._state = self._say_on
        return True

    def _follow(self) -> bool:
        rest = self._held.lstrip(" \t\r\n,;")
        end = next((end for end in self.way.ends if rest.startswith(end)), "")
        if end:
            self._held = rest.removeprefix(end)
            return True
        if not rest:
            self._held = "" if self._whole else self._held
            return False
        if not self._whole and any(one.startswith(rest) for one in (*self.way.ends, *self.way.marks)):
            return False
        if rest.startswith(self.way.marks or "{") or (isinstance(self.way, Objects) and rest[0] == "{"):
            self._held, self._state = rest, self._call
        else:
            self._state = self._say_on
        return True

    def _say(self, size: int) -> None:
        said, self._held = self._held[:size], self._held[size:]
        if not self._has_said:
            said, self._space = self._space + said, ""
            if not said.strip():
                said, self._space = "", said
        self._has_said = self._has_said or bool(said)
        self._said += said


def find_thoughts(template: str, tail: str, formed: bool) -> ThoughtReader | None:
    """For one answer; None: its model does not think, for its template knows nothing of it.

    Args:
        template: of the model's chats.
        tail: the end of the prompt's text, which may begin a thought.
        formed: the answer has a form, and so does not go on with a thought of the prompt's.
    """
    if THOUGHT not in template:
        return None
    return ThoughtReader(begun=not formed and tail.rstrip().endswith(THINK))


class ThoughtReader:
    """Parts what is thought, at an answer's beginning, from the rest. Space around it belongs to neither.

    Args:
        begun: the prompt has the beginning of it.
    """

    def __init__(self, begun: bool) -> None:
        self._held = THINK if begun else ""
        self._state = "before"

    def push(self, text: str, whole: bool = False) -> tuple[str, str]:
        """What is thought and what else comes, as far as it is sure."""
        if self._state == "behind":
            return "", text
        self._held += text
        if self._state == "before":
            start = self._held.lstrip()
            if not whole and THINK.startswith(start):
                return "", ""
            if not start.startswith(THINK):
                self._state = "behind"
                return "", self._release(self._held)
            self._held, self._state = start.removeprefix(THINK).lstrip(), "within"
        thought = ""
        if self._state == "within":
            thought, end, rest = self._held.partition(THOUGHT)
            if not end:
                sure = len(thought) if whole else len(thought[: len(thought) - begun(thought, THOUGHT)].rstrip())
                return thought[:sure], self._release("", self._held[sure:])
            thought, self._held, self._state = thought.rstrip(), rest, "answer"
        start = self._held.lstrip()
        if start or whole:
            self._state = "behind"
            return thought, self._release(start)
        return thought, ""

    def _release(self, text: str, held: str = "") -> str:
        self._held = held
        return text
