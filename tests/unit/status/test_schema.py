"""docs/status.schema.json is what the program makes of its own shapes.

After a change: `python -m tests.unit.status.test_schema` writes it anew. Fields may be added; a field that goes or
changes its meaning breaks who reads it.
"""

from __future__ import annotations

import inspect
import json
from typing import Any

import msgspec

from proxy.status.rows import Status
from tests.program import ROOT

PATH = ROOT / "docs" / "status.schema.json"


def schema() -> dict[str, Any]:
    made = msgspec.json.schema(Status)
    for definition in made["$defs"].values():
        if "description" in definition:
            definition["description"] = " ".join(inspect.cleandoc(definition["description"]).split())
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "/status.json of greenarrow_proxy",
        **made,
    }


def written() -> str:
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


def test_the_published_schema_is_that_of_the_program() -> None:
    assert PATH.read_text() == written()


if __name__ == "__main__":
    PATH.write_text(written())
