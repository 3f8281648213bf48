"""Staging: CPU buffers that a step's tensors are copied into, so that training goes on while they are written."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from weft.checkpoint.region import Piece, Region


class Staging:
    """Buffers that are made once, at the first copy, and used again: as many bytes as the pieces that are written."""

    def __init__(self) -> None:
        self._buffers: dict[Region, Tensor] = {}

    def copy(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Pieces whose data no longer follows the training; those that another process writes are left as they are.

        Tensors of a GPU travel through pinned memory, all at once; on return every byte has arrived.
        """
        copied, used = [], {}
        devices = set()
        for piece in pieces:
            if not piece.writes or piece.region.empty:
                copied.append(piece)
                continue
            source = piece.data.detach()
            buffer = self._buffers.get(piece.region)
            if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
                buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            buffer.copy_(source, non_blocking=source.is_cuda)
            if source.is_cuda:
                devices.add(source.device)
            used[piece.region] = buffer
            copied.append(Piece(piece.region, buffer, piece.writes))
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        self._buffers = used
        return copied
