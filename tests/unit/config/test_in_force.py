"""What a configuration says, as an operator asks a running program for it."""

from __future__ import annotations

import pytest

from proxy.config import load as config
from proxy.config.in_force import digest
from proxy.config.options import OPTIONS

SECRET = "Tr0ub4dor-Tr0ub4dor-Tr0ub4dor-Tr0ub4dor"
TEXT = f"""\
listen_socks5 127.0.0.1:1080, 127.0.0.1:1081
allow_from 127.0.0.1
auth_shared_secret {SECRET}
include more
instance mta1 {{
  weight 2
  auth_shared_secret {SECRET}2
}}
"""
MORE = """\
deny_destination 203.0.113.7
throttle gmail {
  mx *.google.com
  max_concurrent_connections 5
}
instance plain {
}
"""


def rows(text=TEXT, environ=(), flags=(), files=(("more", MORE),)):
    contents = dict(files) | {"f": text, "./more": MORE}
    return config.load(["--config-filename=f", *flags], dict(environ), contents.__getitem__).in_force


def of(found, directive, block=""):
    return [row[2:] for row in found if row[:2] == (block, directive)]


def test_each_value_has_its_place() -> None:
    found = rows(environ={"GREENARROW_PROXY_MAX_CONNECTIONS": "77"}.items(), flags=["--stats-interval=5s"])
    assert of(found, "listen_socks5") == [("127.0.0.1:1080", "f:1"), ("127.0.0.1:1081", "f:1")]
    assert of(found, "max_connections") == [("77", "environment GREENARROW_PROXY_MAX_CONNECTIONS")]
    assert of(found, "stats_interval") == [("5s", "command line")]
    assert of(found, "idle_timeout")[0][1] == "default"
    assert of(found, "weight", "instance mta1") == [("2", "f:6")]


def test_what_an_included_file_says_has_its_place_there() -> None:
    found = rows()
    (mx,) = of(found, "mx", "throttle gmail")
    assert mx[0] == "*.google.com"
    assert mx[1].endswith("more:3")
    assert next(row for row in found if row[0] == "instance plain")[1:3] == ("-", "-")


def test_a_list_that_is_added_to_shows_its_default_too() -> None:
    denied = of(rows(), "deny_destination")
    assert ("203.0.113.7", denied[-1][1]) == denied[-1]
    assert ("10.0.0.0/8", "default") in denied


def test_every_directive_is_there_and_no_secret() -> None:
    found = rows()
    assert {row[1] for row in found if not row[0]} == {option.name for option in OPTIONS}
    assert SECRET not in repr(found)
    assert of(found, "auth_shared_secret") == [("(secret)", "f:3")]
    assert of(found, "auth_shared_secret", "instance mta1") == [("(secret)", "f:7")]


@pytest.mark.parametrize(
    "other", [TEXT.replace("127.0.0.1:1081", "127.0.0.1:1082"), TEXT.replace("weight 2", "weight 3")]
)
def test_the_digest_tells_configurations_apart(other) -> None:
    assert digest(rows()) == digest(rows())
    assert digest(rows()) == digest(rows(TEXT + "\n# a comment\n"))
    assert digest(rows()) != digest(rows(other))
