"""Words for messages: what may have been meant, and how a value is shown."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable

_SHOWN = 60  # characters of a value in a message


def did_you_mean(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""


def shown(text: str) -> str:
    """A value for a message: escaped, cut."""
    return json.dumps(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
