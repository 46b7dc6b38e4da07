"""Names of TLS servers. Expected A-labels are those of RFC 3492, RFC 5891 and the registries, not our own output."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocols.server_name import server_name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("mx.example.net", "mx.example.net"),
        ("MX.Example.NET", "mx.example.net"),
        # As DNS answers spell it; RFC 6066 section 3: "without a trailing dot".
        ("mx.example.net.", "mx.example.net"),
        ("mx_1.example.net", "mx_1.example.net"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.example.", "xn--bcher-kva.example"),
        # IDNA 2008 keeps the sharp s (RFC 5894 section 7.2); IDNA 2003 made it ss, which is somebody else's name.
        ("faß.de", "xn--fa-hia.de"),
        ("例え.テスト", "xn--r8jz45g.xn--zckzah"),
        ("例え。テスト", "xn--r8jz45g.xn--zckzah"),
        ("localhost", "localhost"),
        ("192.0.2.1", "192.0.2.1"),
        ("[192.0.2.1]", "192.0.2.1"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("[IPv6:2001:db8::1]", "2001:db8::1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("a" * 63 + ".example", "a" * 63 + ".example"),
    ],
)
def test_one_form_for_each_name(text: str, name: str) -> None:
    assert server_name(text) == name
    assert server_name(name) == name


@pytest.mark.parametrize(
    "text",
    [
        "mx..test",
        ".example.net",
        "mx.example.net..",
        ".",
        "a" * 64 + ".example",
        ".".join(["a" * 60] * 5),
        "mx example.net",
        "mx.example.net:25",
        "*.example.net",
        "user@example.net",
        "192.0.2.1.",
        "192.0.2",
        "192.0.2.256",
        "fe80::1%eth0",
        "[mx.example.net]",
        "mx\x7f.example",
        "\u200b.example",
        "ex\u0301\u202eample.net",
        "ü" * 63 + ".example",
    ],
)
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        server_name(text)
    assert str(refused.value).isprintable()


@given(st.text(max_size=40))
def test_any_text(text: str) -> None:
    try:
        name = server_name(text)
    except ValueError:
        return
    assert name.isascii()
    assert server_name(name) == name
