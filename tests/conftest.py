"""For all tests."""

import os
import signal

from hypothesis import settings

# Models here are small: a second thread of torch has nothing to do, and beside other work each would wait for the other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure() -> None:
    """Signals work in tests, and in what they start, even where the tests themselves run in the background of a shell, or
    under nohup."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


settings.register_profile("weft", deadline=None)  # a busy machine is no reason to fail
settings.load_profile("weft")
