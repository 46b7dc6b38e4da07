"""What the tests of several processes start with."""

import pytest

from tests.mx import Mx


@pytest.fixture
def smtp():
    """A receiver that speaks SMTP."""
    with Mx() as smtp:
        yield smtp
