"""Which `tls` block holds for whom, what the configuration refuses, and whose name a receiver has under a block."""

import pytest

from proxy.config import load as config
from proxy.errors import ConfigError
from proxy.model import Names
from proxy.policy.directory import Answer, Book, Host
from proxy.policy.tls_rules import TlsRules

BASE = "listen_socks5 127.0.0.1:1080\nsocks5_auth none\nallow_from 127.0.0.1\nsource vmta1 {\n ip 192.0.2.7\n}\n"
AD = "dns_server 127.0.0.1\ndns_trust_ad yes\n"


def load(text):
    return config.load(["--config-filename=f"], {}, lambda path: BASE + text).settings


def rules(*blocks, directory=None, more=AD):
    """Blocks called a, b, c ... of these lines."""
    text = "".join(f"tls {name} {{\n {lines}\n}}\n" for name, lines in zip("abcdefgh", blocks, strict=False))
    read = load(more + text)
    return TlsRules(read.tls, read.source, directory)


def of(rules, source="192.0.2.1", destination="198.51.100.1", instance="box7", mx="", domain=""):
    rule = rules.match(instance, source, destination, Names(mx, domain))
    return rule and rule.block


def test_the_first_that_fits_holds_whole():
    it = rules(
        "destination 198.51.100.0/24\n source vmta1\n level required",
        "destination 198.51.100.0/24\n level verify\n names mx.example.net",
        "min TLSv1.3",
    )
    assert of(it, source="192.0.2.7") == "a"
    assert of(it) == "b"
    assert of(it, destination="203.0.113.1") == "c"
    rule = it.match("box7", "192.0.2.1", "203.0.113.1")
    assert (rule.level, rule.minimum, rule.names) == (None, "TLSv1.3", ())


def test_nothing_is_said_where_none_fits():
    it = rules("instance other\n level required", "mx *.example.net\n level required")
    assert of(it) is None
    assert of(it, mx="mx.example.net") == "b"
    assert not rules()


@pytest.fixture
def book():
    """One address is an MX of two domains, under two names."""
    book = Book()
    book.want(["a.example", "b.example"], 0.0)
    assert {book.next(0.0), book.next(0.0)} == {"a.example", "b.example"}
    book.learn("a.example", Answer((Host("mx.a.example", ("198.51.100.1",)),), 300.0), 0.0)
    book.learn("b.example", Answer((Host("evil.b.example", ("198.51.100.1",)),), 300.0), 0.0)
    return book


def test_a_receiver_is_known_as_the_host_of_the_block_s_own_domains(book):
    it = rules("domain a.example\n level dane", directory=book)
    assert it.match("", "192.0.2.1", "198.51.100.1").hosts == ("mx.a.example",)
    said = it.match("", "192.0.2.1", "198.51.100.1", Names("mx9.a.example"))
    assert said.hosts == ("mx9.a.example",), "the client knows better"
    it = rules("destination 198.51.100.1\n level dane", directory=book)
    assert set(it.match("", "192.0.2.1", "198.51.100.1").hosts) == {"mx.a.example", "evil.b.example"}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("tls a {\n level dane\n}\n", 7, "needs a dns_server that checks DNSSEC, and dns_trust_ad yes"),
        ("dns_server 127.0.0.1\ntls a {\n level dane-only\n}\n", 8, "dns_trust_ad yes"),
        ("dns_trust_ad yes\n", 7, "dns_server is missing"),
        ("tls a {\n level secure\n}\n", 8, "is not none, opportunistic, required, verify, dane or dane-only"),
        ("tls a {\n level required\n names x.example\n}\n", 7, "names have no effect"),
        ("tls a {\n level none\n min TLSv1.2\n}\n", 7, "level none"),
        ("tls a {\n min SSLv3\n}\n", 8, "is not TLSv1, TLSv1.1, TLSv1.2 or TLSv1.3"),
        ("tls a {\n ciphers DEFAULT@SECLEVEL=0\n}\n", 8, "is not a list of ciphers"),
        ("tls a {\n source vmta9\n}\n", 7, "source vmta9 is neither"),
        ("tls a {\n names *\n}\n", 8, "is not an MX host"),
    ],
)
def test_mistakes_have_their_line(text, line, words):
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert caught.value.line == line
    assert words in str(caught.value)
