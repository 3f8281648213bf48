"""For all tests."""

import signal

from hypothesis import settings


def pytest_configure() -> None:
    """Ctrl-C works in tests, and in what they start, even where the tests themselves run in the background of a shell."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


settings.register_profile("weft", deadline=None)  # a busy machine is no reason to fail
settings.load_profile("weft")
