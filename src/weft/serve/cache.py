"""The key-value cache of one layer."""

from __future__ import annotations

from torch import Tensor


class KeyValues:
    """Keys and values of the tokens so far (models/attention.py's LayerCache), in storage allocated ahead.

    Storage takes its batch, heads, dtype and device from the first keys, so it fits a layer cut by head as it stands.
    It holds `capacity` tokens at first and doubles when full, never beyond `limit` unless more tokens do come.
    """

    def __init__(self, capacity: int, limit: int) -> None:
        self.capacity, self.limit = capacity, limit
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add [B, K, T, E] of the new tokens; views of all keys and values so far, [B, K, S, E], come back."""
        start, end = self.length, self.length + keys.shape[2]
        if self._keys is None or self._values is None or end > self.capacity:
            if end > self.capacity:
                self.capacity = max(end, min(2 * self.capacity, self.limit))
            self._keys = _moved(self._keys, keys, start, self.capacity)
            self._values = _moved(self._values, values, start, self.capacity)
        self._keys[:, :, start:end] = keys
        self._values[:, :, start:end] = values
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows of the batch, in this order. rows [R] of integers."""
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys[rows], self._values[rows]


def _moved(old: Tensor | None, like: Tensor, length: int, capacity: int) -> Tensor:
    """Storage [B, K, capacity, E] that begins with the `length` tokens of the old one."""
    batch, heads, _, head_dim = like.shape
    new = like.new_empty(batch, heads, capacity, head_dim)
    if old is not None:
        new[:, :, :length] = old[:, :, :length]
    return new
