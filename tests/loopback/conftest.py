"""What all of these tests need."""

from __future__ import annotations

import pytest
from gevent import get_hub


@pytest.fixture(autouse=True)
def _the_loop_knows_the_time() -> None:
    """The loop does not run between two tests, and the timeouts of `joinall` and `get` count from its last look at the
    clock: after ten seconds of other tests they would be over at once."""
    get_hub().loop.update_now()
