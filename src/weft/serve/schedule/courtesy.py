"""How much of its prompts a tenant may have read in steps in which others' texts go on. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable

from weft.serve.schedule.steptimes import StepTimes

LONGER = 4 / 3
"""How many times as long one tenant's prompts make such steps, on the average: a quarter of their time is its."""

KEPT_STEPS = 16
"""A tenant may have at once what it left in so many steps before: who asks now and then does not wait."""


class Courtesy:
    """
    Attributes:
        times: how long steps take, from whoever runs them.
    """

    def __init__(self) -> None:
        self.times = StepTimes()
        self._step = 0
        self._left: dict[str, tuple[int, int]] = {}  # tokens that a tenant had left, and in which step

    def begin(self, writing: Iterable[str], tokens: int) -> None:
        """A step that writes texts of these tenants, of so many tokens; prompts come on top."""
        self._step += 1
        self._writing, self._tokens = set(writing), tokens
        self._each: int | None = None

    def most(self, tenant: str, left: int) -> int:
        """Of the `left` tokens that the step has room for, those that may be of this tenant's prompts."""
        return left if self._writing <= {tenant} else min(left, self._saved(tenant))

    def took(self, tenant: str, count: int) -> None:
        """So many are. Where it holds up nobody, that is not counted."""
        if not self._writing <= {tenant}:
            self._left[tenant] = self._saved(tenant) - count, self._step

    def _saved(self, tenant: str) -> int:
        if self._each is None:
            self._each = self.times.most(self._tokens, LONGER) - self._tokens
        left, step = self._left.get(tenant, (0, self._step - KEPT_STEPS))
        return min(KEPT_STEPS * self._each, left + (self._step - step) * self._each)
