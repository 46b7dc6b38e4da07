"""Names as RFC 6125 and RFC 8461 compare them; TLSA records as RFC 6698 and RFC 7672 use them."""

import hashlib

import pytest

from proxy.policy.certificates import Demand, Tlsa, client_names, matches, name_fits, usable

CERTIFICATE, KEY = b"a certificate", b"its public key"


@pytest.mark.parametrize(
    ("wanted", "presented", "fits"),
    [
        ("mx.example.net", "mx.example.net", True),
        ("MX.Example.net", "mx.eXample.NET", True),
        ("mx.example.net.", "mx.example.net", True),
        ("mx.example.net", "mx1.example.net", False),
        ("mx.example.net", "*.example.net", True),
        ("a.mx.example.net", "*.example.net", False),  # one label, RFC 6125 section 6.4.3
        ("example.net", "*.example.net", False),
        ("mx.example.net", "m*.example.net", False),
        ("mx.example.net", "*.net", False),  # no registry's domain
        ("mx.net", "*.net", False),
        ("mx.example.net", "*", False),
        ("mx.example.net", "*.*.net", False),
        ("*.example.net", "mx.example.net", True),  # an MTA-STS policy's pattern
        ("*.example.net", "*.example.net", True),
        ("*.example.net", "a.mx.example.net", False),
        ("*.example.net", "example.net", False),
        ("*.net", "example.net", False),
        ("", "", False),
        ("mx.example.net", "", False),
        ("192.0.2.1", "192.0.2.1", True),
        ("xn--bcher-kva.example.net", "xn--bcher-kva.example.net", True),
    ],
)
def test_a_name_fits(wanted, presented, fits):
    assert name_fits(wanted, presented) is fits


@pytest.mark.parametrize(
    ("record", "good"),
    [
        ((3, 1, 1, b"x" * 32), True),
        ((3, 0, 1, b"x" * 32), True),
        ((3, 1, 2, b"x" * 64), True),
        ((3, 1, 0, b"x"), True),
        ((2, 0, 1, b"x" * 32), True),
        ((2, 1, 2, b"x" * 64), True),
        ((0, 0, 1, b"x" * 32), False),  # RFC 7672 section 3.1.3
        ((1, 1, 1, b"x" * 32), False),
        ((4, 1, 1, b"x" * 32), False),
        ((255, 1, 1, b"x" * 32), False),
        ((3, 2, 1, b"x" * 32), False),
        ((3, 1, 3, b"x" * 32), False),
        ((3, 1, 1, b"x" * 31), False),
        ((3, 1, 2, b"x" * 32), False),
        ((3, 1, 0, b""), False),
    ],
)
def test_a_record_is_usable(record, good):
    assert usable([Tlsa(*record)]) == ((Tlsa(*record),) if good else ())


@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize("matching", [0, 1, 2])
def test_a_record_is_about_a_certificate_or_about_its_key(selector, matching):
    what = (CERTIFICATE, KEY)[selector]
    data = (what, hashlib.sha256(what).digest(), hashlib.sha512(what).digest())[matching]
    assert matches(Tlsa(3, selector, matching, data), CERTIFICATE, KEY)
    assert not matches(Tlsa(3, selector, matching, data), CERTIFICATE + b".", KEY + b".")
    assert not matches(Tlsa(3, 1 - selector, matching, data), CERTIFICATE, KEY)


def test_what_a_connection_proved_is_told_apart():
    key = Tlsa(3, 1, 1, b"x" * 32), Tlsa(3, 1, 1, b"y" * 32)
    demands = [
        Demand(),
        Demand(("mx.example.net",), True),
        Demand(("mx2.example.net",), True),
        Demand(("mx.example.net",), False, key[:1]),
        Demand(("mx.example.net",), False, key[1:]),
        Demand(("mx.example.net",), False, key),
    ]
    assert len({demand.word for demand in demands}) == len(demands)
    assert Demand((), False, key).word == Demand((), False, key[::-1]).word
    assert [demand.mandatory for demand in demands] == [False, True, True, True, True, True]
    assert Demand(("mx.example.net",)).word == ""


@pytest.mark.parametrize(
    ("certificate", "names"),
    [
        (None, []),
        ({}, []),
        (
            {"subjectAltName": (("DNS", "MTA1.example"), ("IP Address", "192.0.2.1"), ("DNS", "mta2.example"))},
            ["mta1.example", "mta2.example"],
        ),
        ({"subject": ((("commonName", "cn.example"),),), "subjectAltName": (("DNS", "san.example"),)}, ["san.example"]),
        ({"subject": ((("organizationName", "Example"),), (("commonName", "cn.example"),))}, ["cn.example"]),
        ({"subjectAltName": (("DNS", "*.example"), ("DNS", "x" * 65), ("DNS", "x" * 64), ("DNS", "a b"))}, ["x" * 64]),
    ],
)
def test_names_of_a_clients_certificate(certificate, names):
    assert client_names(certificate) == names


def test_what_there_is_to_prove():
    good = Tlsa(3, 1, 0, KEY)
    unusable = Tlsa(0, 1, 0, KEY)
    for demand, mandatory, binding in (
        (Demand(("mx",)), False, False),
        (Demand(("mx",), authority=True), True, True),
        (Demand(("mx",), tlsa=(unusable,)), True, False),
        (Demand(("mx",), tlsa=(unusable, good)), True, True),
    ):
        assert (demand.mandatory, demand.binding) == (mandatory, binding)


def test_no_name_fits_no_name():
    assert not name_fits("", "")
    assert not name_fits(".", "")
    assert not name_fits("*.b.example", "*.*.b.example")
