"""The grammar of the configuration file."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import file


def parse(text):
    return file.parse(text, "f")


def mistakes(text):
    document = parse(text)
    of_directives = [d for d in document.directives if d.problem]
    of_directives += [d for block in document.blocks for d in block.directives if d.problem]
    return [(m.line, m.message) for m in document.mistakes] + [(d.line, d.problem) for d in of_directives]


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("d a", ["a"]),
        ("  d\t a  ", ["a"]),
        ('d "a b"', ["a b"]),
        (r'd "a\"\\\u00e9\n"', ['a"\\é\n']),
        (r"d `a\b\"`", ['a\\b\\"']),
        ("d ``", [""]),
        ('d ""', [""]),
        ("d a,b , c", ["a", "b", "c"]),
        ('d "a, b",`c`,d', ["a, b", "c", "d"]),
        ('d a # a comment, with `quotes" and { braces }', ["a"]),
        ('d "a"# a comment', ["a"]),
        ("d a#b", ["a#b"]),
        ('d "a # b"', ["a # b"]),
        ('d "{", `}`', ["{", "}"]),
        ("d [::]:807", ["[::]:807"]),
        ("d é", ["é"]),
    ],
)
def test_values(line, values):
    document = parse(line)
    assert not mistakes(line)
    assert document.directives == [("d", values, 1, "", False)]


@pytest.mark.parametrize("text", ["", "\n\n", "# x", "   # x\n\t", "\ufeff", "\r\n\r\n", "#", "\ufeff# x"])
def test_nothing_in_it(text):
    assert parse(text) == file.Document()


def test_lines_are_counted_in_lf_and_crlf_files_with_a_byte_order_mark():
    expected = [("a", ["1"], 1, "", False), ("b", ["2"], 3, "", False)]
    assert parse("\ufeffa 1\n\nb 2").directives == expected
    assert parse("\ufeffa 1\r\n\r\nb 2\r\n").directives == expected


def test_a_block():
    document = parse('x 1\nthrottle "a b" { # c\n  w 20s\n\n  l 1, 2 # c\n} # c\ny 2\n')
    assert not document.mistakes
    assert document.blocks == [("throttle", "a b", [("w", ["20s"], 3, "", False), ("l", ["1", "2"], 5, "", False)], 2)]
    assert [directive.name for directive in document.directives] == ["x", "y"]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("d", 1, "a value is missing"),
        ("d # x", 1, "a value is missing"),
        ("d a,", 1, "missing after the comma"),
        ("d ,a", 1, "a value is missing"),
        ("d a,,b", 1, "a value is missing"),
        ("d a b", 1, "a comma is missing"),
        ('d "a', 1, "column 3: the quote is not closed"),
        (r'd "a\"', 1, "the quote is not closed"),
        ("d `a", 1, "the quote is not closed"),
        (r'd "\x"', 1, "not a JSON string"),
        ('d a"b"', 1, "quote the whole value"),
        ('d "a"b', 1, "quote the whole value"),
        ("d = a", 1, "no `=`"),
        ("d=a", 1, "no `=`"),
        ("d a\x00", 1, "U+0000"),
        ("d a\x0b", 1, "U+000B"),
        ("d a\rd b", 1, "U+000D"),
        ("d a\ud800", 1, "U+D800"),
        ("d\u00a0a", 1, "U+00A0"),
        ("# \x1b[31m", 1, "U+001B"),
        ('"d" a', 1, "begins with the name"),
        ("1 a", 1, "begins with the name"),
        (", a", 1, "begins with the name"),
        ("\n}", 2, "without a block"),
        ("b n {", 1, "not closed"),
        ("b n {\nb m {\n}\n}", 2, "a block within a block"),
        ("b {\n}", 1, "one name"),
        ("b n m {\n}", 1, "one name"),
        ("{\n}", 1, "one name"),
        ("b n {\n} x", 2, "nothing may follow"),
        ("b n { d a }", 1, "a block begins with a line"),
        ("d a{b", 1, "a brace in a value is quoted"),
    ],
)
def test_one_mistake_is_reported_once_with_its_line(text, line, words):
    found = mistakes(text)
    assert [where for where, _ in found] == [line]
    assert words in found[0][1]


def test_what_is_in_a_block_that_begins_wrongly_is_not_blamed_too():
    assert len(mistakes("b {\n w 1\n}\nd a")) == 1
    assert parse("b {\n w 1\n}\nd a").directives == [("d", ["a"], 4, "", False)]


def test_all_mistakes_are_reported():
    assert [line for line, _ in mistakes('d\nd "\n}\nd a\nd a b')] == [3, 1, 2, 5]


def test_a_file_that_is_too_long_is_refused_before_it_is_read():
    document = parse("d a\n" * (file.LONGEST_FILE // 4 + 1))
    assert not document.directives
    assert "longer than" in document.mistakes[0].message


def test_a_long_list_is_read_in_one_go():
    values = [f"10.{i >> 8 & 255}.{i & 255}.0/24" for i in range(50_000)]
    assert parse("d " + ",".join(values)).directives[0].values == values


SCRAPS = st.sampled_from(
    [
        "listen",
        "b n {",
        "}",
        "{",
        '"',
        "`",
        ",",
        " ",
        "\n",
        "\r\n",
        "#",
        "\\",
        "\\u",
        "0",
        "a",
        "=",
        "\ufeff",
        "\0",
        "é",
    ]
)
TEXTS = st.one_of(st.text(), st.lists(SCRAPS).map("".join))


@given(TEXTS)
def test_no_text_raises_anything(text):
    lines = text.count("\n") + 1
    assert all(0 < line <= lines for line, _ in mistakes(text))


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), min_size=1))
def test_every_list_of_texts_can_be_written_as_json(values):
    assert parse("d " + ", ".join(json.dumps(value) for value in values)).directives == [("d", values, 1, "", False)]


@given(
    st.from_regex(r"[ \t]*[A-Za-z_-][A-Za-z0-9_-]{,3}[ \t]", fullmatch=True),
    st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7F)),
    st.sampled_from(["{}", '"{}"']),
    st.sampled_from(["", " ", "\t\r"]),
)
def test_the_short_way_for_plain_lines_leads_to_the_same(name, value, shape, end):
    line = name + shape.format(value) + end
    directives, wrong = parse(line).directives, mistakes(line)
    plain = file._PLAIN.fullmatch(line) is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "_PLAIN", re.compile("(?!)"))
        assert (parse(line).directives, mistakes(line)) == (directives, wrong)
    assert not plain or (len(directives) == 1 and not wrong)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="`")))
def test_every_text_without_backticks_can_be_written_in_backticks(value):
    assert parse(f"d `{value}`").directives == [("d", [value], 1, "", False)]


@given(TEXTS, st.sampled_from(['"{}', "`{}", '"{}" x', "{}=", "={}", '"{}\\x"', "{} x", '"{}" }}', '{{"{}"']))
def test_no_message_shows_a_value(text, shape):
    secret = "Tr0ub4dor-Tr0ub4dor-Tr0ub4dor-Tr0ub4dor"
    for message in mistakes(text + "\nauth_shared_secret " + shape.format(secret)):
        assert secret not in message[1]
