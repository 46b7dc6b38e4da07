"""What tests of several doors have in common; a file that makes a thing of the same name itself gets its own."""

import pytest

from tests.sinks import Raw, greet


@pytest.fixture
def mx():
    """A receiver that greets, and waits for the end."""
    with Raw(greet) as mx:
        yield mx
