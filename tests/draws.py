"""How many settings a test draws at random: a few, always the same, or `WEFT_EXAMPLES` of them, others each time."""

import os

from hypothesis import HealthCheck, settings

EXAMPLES = os.environ.get("WEFT_EXAMPLES")


def draws(few: int) -> settings:
    return settings(
        max_examples=int(EXAMPLES or few),
        deadline=None,
        derandomize=EXAMPLES is None,
        suppress_health_check=[
            HealthCheck.filter_too_much,
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
        ],
    )
