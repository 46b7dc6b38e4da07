"""`backoff` rules: what can be written, and what is said of what cannot."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import file
from proxy.config import load as config
from proxy.errors import ConfigError
from proxy.settings import BackoffSettings, Rate

BASE = "listen_socks5 127.0.0.1:1080\nsocks5_auth none\nallow_from 127.0.0.1\n"


def read(lines: str) -> tuple[BackoffSettings, ...]:
    text = f"{BASE}throttle yahoo {{\n{lines}\n}}\n"
    return config.load(["--config-filename=f"], {}, lambda path: text).settings.throttle[0].backoff


def mistake(lines: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(lines)
    return str(caught.value)


def test_a_rule_on_one_line_and_the_same_on_several():
    """The first is that of the documents, to the letter."""
    rule = BackoffSettings(on=("421", "4.7.", "TSS04"), over=Rate(5, 60), percent=25, return_after=3600.0)
    one_line = 'backoff on 421, "4.7.", "TSS04" over 5/min { percent 25; return_after 1h }'
    assert read(one_line) == (rule,)
    assert read(one_line + "  # a comment; with { braces }") == (rule,)
    assert read("backoff on 421,4.7.,TSS04 over 5/min {percent 25;return_after 1h;}") == (rule,)
    assert read(
        'backoff on 421, "4.7.", TSS04 over 5/min {  # why\n\n  percent 25 # half of half\n  return_after 1h\n}\n'
    ) == (rule,)


def test_the_acts_and_what_stands_in_for_them():
    assert read('backoff on "5.7.1 .*blocked" { pause; return_after 6h }') == (
        BackoffSettings(on=("5.7.1 .*blocked",), pause=True, return_after=21600.0),
    )
    assert read("backoff on 450 { rate 100/hr }") == (BackoffSettings(on=("450",), rate=Rate(100, 3600)),)
    assert read("backoff on 421 {}\nbackoff on `a{2}\\.`, over, on { }") == (
        BackoffSettings(on=("421",), percent=50, return_after=300.0),
        BackoffSettings(on=("a{2}\\.", "over", "on")),
    )


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('backoff on 421, "5.7.1 (" { pause }', 'pattern "5.7.1 (": character 7: missing )'),
        ("backoff on `(a)\\1` { pause }", 'pattern "(a)\\\\1": character 4: invalid escape sequence'),
        ("backoff 421 { pause }", "`on` and a pattern are missing"),
        ("backoff { pause }", "`on` and a pattern are missing"),
        ("backoff on { pause }", "patterns are separated by commas"),
        ("backoff on 421 450 { pause }", "patterns are separated by commas"),
        ("backoff on 421, { pause }", "patterns are separated by commas"),
        ("backoff on 421 over 5 { pause }", "the time is missing"),
        ("backoff on 421 over 5000/min { pause }", "at most 1000"),
        ("backoff on 421 { pause; percent 5 }", "one of percent, rate and pause"),
        ("backoff on 421 { percent 100 }", "percent: not a whole number from 1 to 99"),
        ("backoff on 421 { percent }", "percent: one value"),
        ("backoff on 421 { pause 5m }", "pause takes no value"),
        ("backoff on 421 { return_after 5 }", "return_after: a unit is missing"),
        ("backoff on 421 { return_after 1h; return_after 2h }", "return_after is given twice"),
        ("backoff on 421 { rate 0 }", "`pause` is meant"),
        ("backoff on 421 { retrun_after 1h }", "did you mean return_after?"),
        ("backoff on 421 { percent, 5 }", "no `,` in the braces"),
        ("backoff on 421", "it ends with a body in braces"),
        ('backoff on 421, "4.7." over 5/min', "it ends with a body in braces"),
        ("wait 20s { pause }", "wait: a body in braces does not belong here"),
        ("backoff on 421 over 5/min {\n percent 5 {", "f:7: within backoff: a line `}` for line 6 is missing"),
    ],
)
def test_what_is_no_rule_is_told_with_file_and_line(lines, said):
    text = mistake("max_concurrent_connections 1\n" + lines)
    assert said in text
    if "\n" not in lines:
        assert text.startswith('f:6: throttle "yahoo": '), text


def test_a_body_that_is_not_closed_is_told_where_it_begins():
    document = file.parse("throttle yahoo {\nbackoff on 421 {\n percent 25\n", "f")
    assert [str(each) for each in document.mistakes] == ["f:2: backoff: its body is not closed: a line `}` is missing"]
    assert "f:4: the throttle block is not closed" in mistake("backoff on 421 {\n percent 25")


def test_all_mistakes_behind_a_rule_are_told():
    text = mistake("backoff on 421 over 5/min {\n percent 500\n}\nwait 20")
    assert "f:5: throttle" in text
    assert "f:8: throttle" in text


WORDS = (*"{},;", "on", "over", "421", "4.7.", "5/min", "percent", "25", "pause", "rate", "1/hr", '"a b"', "`(`")


@given(st.lists(st.sampled_from((*WORDS, "return_after", "1h", "\n", "#")), max_size=14))
def test_whatever_is_written_is_a_rule_or_a_mistake_with_its_line(words):
    told = ""
    try:
        read("backoff " + " ".join(words))
    except ConfigError as error:
        told = str(error)
    assert all(line.startswith("f:") for line in told.splitlines())
