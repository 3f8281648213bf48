"""What one request may ask for at most, looked at before anything is allocated for it. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of one request, whatever the protocol.

    Attributes:
        body_bytes: of a body; larger ones are refused, by their announced length before a byte of them is read.
        header_bytes: of all headers and the address together.
        chunks: pieces that a body of no announced length may come in.
        receive_seconds: in which a request must have come in whole, from its first byte.
        stall_seconds: after which a client that does not read its answer is cut off.
        prompts: of one request.
        completions: prompts × n (or best_of).
        messages: of a chat.
        tools: that a chat may call.
        stops: stop texts.
        stop_bytes: of all stop texts together.
        biases: tokens with a logit bias.
        told: log-probabilities in one answer: tokens × the alternatives of each.
    """

    body_bytes: int = 8 * 2**20
    header_bytes: int = 16 * 2**10
    chunks: int = 1024
    receive_seconds: float = 10.0
    stall_seconds: float = 30.0
    prompts: int = 128
    completions: int = 128
    messages: int = 4096
    tools: int = 128
    stops: int = 16
    stop_bytes: int = 4096
    biases: int = 1024
    told: int = 1_000_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"limits: {name} is {value}; it must be above 0")

    def check_count(self, what: str, count: int, most: int) -> None:
        """
        Raises:
            ValueError: there are more than `most`.
        """
        if count > most:
            raise ValueError(f"{count} {what}; this server takes {most} at most")

    def check_stops(self, stops: Sequence[str]) -> None:
        """
        Raises:
            ValueError: too many stop texts, or too long ones.
        """
        self.check_count("stop texts", len(stops), self.stops)
        self.check_count("bytes of stop texts", sum(len(stop.encode()) for stop in stops), self.stop_bytes)
