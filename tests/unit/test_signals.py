import os
import signal

import pytest

from weft.train import signals
from weft.train.signals import ASK, StopRequest


@pytest.mark.parametrize("number", ASK)
def test_a_signal_becomes_a_request(number: signal.Signals) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.signal is number


def test_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in ASK]
    with StopRequest():
        assert [signal.getsignal(number) for number in ASK] != before
    assert [signal.getsignal(number) for number in ASK] == before


def test_two_signals_together_are_one_request() -> None:
    with StopRequest() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal is signal.SIGINT


def test_a_second_signal_later_acts_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "TOGETHER", 0.0)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGUSR1, before)
