"""Which words make a command, for whom, and what the answer looks like."""

from __future__ import annotations

import contextlib
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.control.commands import (
    COMMANDS,
    VERSION,
    Request,
    decode,
    done,
    encode,
    helped,
    parse,
    refused,
    usage,
)
from proxy.errors import Mistake
from tests.program import ROOT


@pytest.mark.parametrize("command", COMMANDS, ids=usage)
def test_each_command_is_found_by_its_words(command) -> None:
    arguments = ["x"] * command.most_arguments
    assert parse([*command.words, *arguments], True) == (command, arguments)
    with pytest.raises(Mistake) as told:
        parse([*command.words, *arguments, "one too many"], True)
    assert told.value.code == "bad_command"
    assert usage(command) in helped().lines[COMMANDS.index(command)]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.changes], ids=usage)
def test_only_some_may_change_something(command) -> None:
    with pytest.raises(Mistake) as told:
        parse([*command.words, *["x"] * command.most_arguments], False)
    assert told.value.code == "not_allowed"


@pytest.mark.parametrize("words", [[], ["show"], ["show", "nothing"], ["shows", "throttles"], ["drop", "cached"]])
def test_what_is_no_command(words) -> None:
    with pytest.raises(Mistake) as told:
        parse(words, True)
    assert told.value.code == "bad_command"


@pytest.mark.parametrize(
    "line", [b"", b"{}", b"[]", b'{"command":"reload"}', b'{"command":[1]}', b"\xff\xfe", b'{"v":2,"command":[]}']
)
def test_what_is_no_request(line: bytes) -> None:
    with pytest.raises(Mistake) as told:
        decode(line)
    assert told.value.code == "bad_request"


@given(st.binary(max_size=200))
def test_random_bytes_are_a_request_or_a_mistake(line: bytes) -> None:
    with contextlib.suppress(Mistake):
        assert isinstance(decode(line), Request)


def test_the_manual_knows_every_command() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    table = text[text.index("## Control socket") : text.index("Every table can be narrowed down")]
    said = {word for code in re.findall(r"`([a-z][a-z ]*)", table) for word in [code.strip()]}
    assert {" ".join(command.words) for command in COMMANDS} <= said


def test_an_answer_is_one_line_with_version_and_verdict() -> None:
    for answer, ok in ((done("a\nb"), True), (refused("failed", "why", ["x"]), False)):
        line = encode(answer)
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        decoded = msgspec.json.decode(line)
        assert (decoded["v"], decoded["ok"]) == (VERSION, ok)


def test_which_commands_change_something_and_what_they_need() -> None:
    """Written out: a row that is wrong would let an observer change things."""
    needs = {" ".join(each.words): each.least_arguments for each in COMMANDS if each.changes}
    assert needs == {
        "reload": 0,
        "close connection": 1,
        "drop cached": 1,
        "log verbose": 0,
        "pause throttle": 1,
        "resume throttle": 1,
        "limit throttle": 2,
        "end override": 1,
        "backoff end": 1,
        "drain": 0,
        "stop": 0,
    }
