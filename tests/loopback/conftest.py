"""What all of these tests need, and what those of the keeper start with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from gevent import get_hub

from tests.loopback import leftovers
from tests.loopback.houses import Elsewhere, House
from tests.mx import Mx

leftovers.watch()


@pytest.fixture(autouse=True, scope="module")
def _no_file_leaves_anything_running() -> Iterator[None]:
    """What fixtures of a file have begun."""
    before = leftovers.now()
    yield
    assert not leftovers.left_since(before)


@pytest.fixture(autouse=True)
def _no_test_leaves_anything_running() -> Iterator[None]:
    """It is the first fixture, so it looks when all others have cleaned up."""
    before = leftovers.now()
    yield
    assert not leftovers.left_since(before)


@pytest.fixture(autouse=True)
def _the_loop_knows_the_time() -> None:
    """The loop does not run between two tests, and the timeouts of `joinall` and `get` count from its last look at the
    clock: after ten seconds of other tests they would be over at once."""
    get_hub().loop.update_now()


@pytest.fixture(params=[House, Elsewhere], ids=["", "elsewhere"])
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., House]]:
    """Makes houses, with the arguments of `House`, and looks at each of them in the end. With the throttle manager at
    hand, and at the other end of a link."""
    houses: list[House] = []

    def make(*arguments: object) -> House:
        houses.append(request.param(*arguments))
        return houses[-1]

    yield make
    for each in houses:
        each.close()


@pytest.fixture
def house(make: Callable[..., House]) -> House:
    return make()


@pytest.fixture
def mx() -> Iterator[Mx]:
    with Mx() as mx:
        yield mx
