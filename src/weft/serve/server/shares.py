"""How much of a model's room each key has. Torch-free."""

from __future__ import annotations

from collections import Counter

from weft.serve.requests.request import RefusedError


class Shares:
    """Completions of each key that run or wait: no key takes all the room.

    Args:
        most: of one key; None: as many as there is room for.
    """

    def __init__(self, most: int | None) -> None:
        self.most = most
        self._held: Counter[str] = Counter()

    def check(self, tenant: str | None, n: int = 1) -> None:
        """
        Args:
            tenant: which key; None: the server itself, which is not counted.

        Raises:
            RefusedError: so many more would be too many.
        """
        if tenant is not None and self.most is not None and self._held[tenant] + n > self.most:
            held = self._held[tenant]
            raise RefusedError(f"{held} completions of this key run or wait already, of {self.most} at most", 1.0)

    def take(self, tenant: str | None, n: int) -> None:
        """
        Raises:
            RefusedError: as `check`.
        """
        self.check(tenant, n)
        if tenant is not None:
            self._held[tenant] += n

    def give_back(self, tenant: str | None, n: int) -> None:
        if tenant is not None:
            self._held[tenant] -= n
            if not self._held[tenant]:
                del self._held[tenant]
