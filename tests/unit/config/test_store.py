"""`throttle_store`: how its address is spelled, what goes with it, and that no password is ever shown."""

from __future__ import annotations

import dataclasses
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import load as config
from proxy.config.in_force import digest
from proxy.config.store import parse_store
from proxy.errors import ConfigError
from proxy.settings import StoreSettings

BASE = "listen_socks5 127.0.0.1:1080\nsocks5_auth none\nallow_from 127.0.0.1\n"
SECRET = "Tr0ub4dor"
HERE = (("127.0.0.1", 6379),)


def single(**changes: Any) -> StoreSettings:
    values: dict[str, Any] = {"kind": "single", "tls": False, "servers": HERE}
    return StoreSettings(**(values | changes))


def read(lines: str, **files: str) -> config.Loaded:
    contents = files | {"f": BASE + lines}

    def read_file(path: str) -> str:
        if path not in contents:
            raise FileNotFoundError(2, "No such file or directory")
        return contents[path]

    return config.load(["--config-filename=f"], {}, read_file)


def mistake(lines: str, **files: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(lines, **files)
    assert SECRET not in str(caught.value)
    return str(caught.value)


S3 = (("s1.example", 26379), ("s2.example", 26380), ("2001:db8::3", 26379))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("memory", None),
        ("redis://127.0.0.1", single()),
        ("valkey://127.0.0.1:6379", single()),
        ("redis://127.0.0.1:6379/", single()),
        ("redis://127.0.0.1/5", single(database=5)),
        ("redis://STORE.Example.:7000", single(servers=(("store.example", 7000),))),
        ("redis://[2001:DB8::1]:7000/1", single(servers=(("2001:db8::1", 7000),), database=1)),
        ("redis://:p%40ss%2Fw%3Ard@127.0.0.1", single(password="p@ss/w:rd")),
        ("redis://proxy:a:b@127.0.0.1", single(user="proxy", password="a:b")),
        ("redis://proxy@127.0.0.1", single(user="proxy")),
        ("redis://gr%C3%BC%C3%9Fe:ü@127.0.0.1", single(user="grüße", password="ü")),
        ("rediss://127.0.0.1", single(tls=True)),
        ("valkeys://127.0.0.1", single(tls=True)),
        (
            "redis+sentinel://:pw@s1.example,s2.example:26380,[2001:db8::3]/mymaster",
            single(kind="sentinel", servers=S3, service="mymaster", password="pw"),
        ),
        (
            "rediss+sentinel://s1.example/m/3",
            single(kind="sentinel", tls=True, servers=S3[:1], service="m", database=3),
        ),
        ("redis+cluster://127.0.0.1,127.0.0.1:6379", single(kind="cluster")),
        ("valkeys+cluster://u:p@127.0.0.1", single(kind="cluster", tls=True, user="u", password="p")),
        ("unix:///run/valkey.sock", single(servers=(), path="/run/valkey.sock")),
        (
            "unix://u:p@/run/a%20b.sock?db=2",
            single(servers=(), path="/run/a b.sock", user="u", password="p", database=2),
        ),
    ],
)
def test_how_it_is_spelled(text: str, expected: StoreSettings | None) -> None:
    assert parse_store(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "disk", "redis", "redis:", "redis://", "redis:///0", "http://127.0.0.1", "Redis://127.0.0.1"),
        *("redis+unix:///x", "unixs:///x", "redis+sentinel+cluster://h/m", "redis://a,b", "redis://127.0.0.1/x"),
        *("redis://127.0.0.1/65536", "redis://127.0.0.1:0", "redis://127.0.0.1:65536", "redis://127.0.0.1:x"),
        *("redis://::1", "redis://[::1", "redis://[x]", "redis://a..b", "redis://1.2.3", "redis://h?db=1"),
        *("redis://@127.0.0.1", "redis://:@127.0.0.1", "redis://:%zz@127.0.0.1", "redis://:%ff@127.0.0.1"),
        *("redis://:a b@127.0.0.1", "redis://:a#b@127.0.0.1", "redis://127.0.0.1/0\x7f"),
        *("redis+sentinel://h", "redis+sentinel://h/", "redis+sentinel://h/a%20b", "redis+sentinel://h/m/x"),
        *("redis+cluster://h/0", "redis+cluster://h,", "unix://", "unix://run/x", "unix:///", "unix:///x?y=1"),
        ",".join(["redis+cluster://h0", *(f"h{number}" for number in range(1, 65))]),
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"^([a-z].*)?$"):
        parse_store(text)


@given(st.text(min_size=1), st.text(min_size=1))
def test_any_user_and_password_can_be_written(user: str, password: str) -> None:
    parsed = parse_store(f"redis://{quote(user, safe='')}:{quote(password, safe='')}@127.0.0.1/1")
    assert parsed == single(user=user, password=password, database=1)


@given(st.text())
def test_any_text_is_an_address_or_a_value_error_that_shows_nothing_of_it(text: str) -> None:
    for scheme in ("redis://", "redis+sentinel://", "redis+cluster://", "unix://"):
        shown = ""
        try:
            parse_store(f"{scheme}:{SECRET}{text}")
        except ValueError as error:
            shown = str(error)
        assert SECRET not in shown


@pytest.mark.parametrize(
    "text",
    [
        *("redis://127.0.0.1:6379", "rediss://store.example:7000/3", "unix:///run/x.sock", "unix:///run/x.sock?db=2"),
        *("redis+sentinel://s1:26379,[2001:db8::3]:26379/mymaster/2", "rediss+cluster://a:1,b:2"),
    ],
)
def test_it_is_shown_as_it_was_written_but_for_user_and_password(text: str) -> None:
    scheme, _, rest = text.partition("://")
    parsed = parse_store(f"{scheme}://{SECRET}:{SECRET}@{rest}")
    assert parsed is not None
    assert parsed.address == text
    assert SECRET not in repr(parsed)


@pytest.mark.parametrize(
    "line",
    [
        "redis+sentinel://:a%20b@s1.example,s2.example:26380,[2001:db8::3]/m/2",
        "redis+sentinel://:a%20b@s1.example, s2.example:26380,  [2001:db8::3]/m/2   # most of them",
        '"redis+sentinel://:a%20b@s1.example,s2.example:26380,[2001:db8::3]/m/2"',
        "`redis+sentinel://:a%20b@s1.example, s2.example:26380, [2001:db8::3]/m/2`",
    ],
)
def test_several_servers_need_no_quotes_in_the_file(line: str) -> None:
    store = read(f"throttle_store {line}\nthrottle_store_members 2\n").settings.throttle_store
    assert store == single(kind="sentinel", servers=S3, service="m", password="a b", database=2)


@pytest.mark.parametrize(
    "line",
    [
        f"redis+cluster://:{SECRET}@a,,b",
        f"redis+cluster://:{SECRET}@a b",
        f"memory, {SECRET}",
    ],
)
def test_a_list_with_a_hole_in_it(line: str) -> None:
    assert "the value is not memory, or an address" in mistake(f"throttle_store {line}\nthrottle_store_members 2\n")


def test_no_password_is_shown_and_it_makes_no_other_configuration() -> None:
    loaded = read(f"throttle_store redis://u:{SECRET}@h\nthrottle_store_members 2\n")
    assert SECRET not in repr(loaded.settings)
    assert SECRET not in repr(loaded.in_force)
    other = read("throttle_store redis://u:another@h\nthrottle_store_members 2\n")
    assert digest(loaded.in_force) == digest(other.in_force)
    assert loaded.settings.throttle_store != other.settings.throttle_store


STORE = "throttle_store redis+sentinel://h/m\nthrottle_store_members 2\n"
FILE, SENTINEL = "throttle_store_password_file", "throttle_store_sentinel_password_file"


def test_memory_can_be_put_in_its_place_for_a_while() -> None:
    assert (
        read(f"throttle_store memory\nthrottle_store_members 2\n{FILE} a\n", a=SECRET).settings.throttle_store is None
    )


def test_passwords_in_files() -> None:
    store = read(f"{STORE}{FILE} a\n{SENTINEL} b\n", a=f"\ufeff# {SECRET} \r\nmore\n", b="x").settings.throttle_store
    assert store is not None
    assert (store.password, store.sentinel_password) == (f"# {SECRET} ", "x")
    user = "throttle_store redis://u@h\nthrottle_store_members 2\n"
    found = read(f"{user}{FILE} a\n", a=SECRET).settings.throttle_store
    assert found == dataclasses.replace(found, user="u", password=SECRET)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("throttle_store redis://h\n", "f:4: throttle_store: throttle_store_members is required with it"),
        ("throttle_store_members 2\n", "f:4: throttle_store_members: has no effect without throttle_store"),
        ("throttle_store redis://h\nthrottle_store_members 0\n", "f:5: throttle_store_members: "),
        (
            f"throttle_store redis://{SECRET}@h\nthrottle_store_members 2\n",
            "f:4: throttle_store: a user without a password; a password alone is written redis://:password@host",
        ),
        (f"throttle_store redis://:{SECRET}@h:x\nthrottle_store_members 2\n", "f:4: throttle_store: the value is not "),
        (f"throttle_store redis://:{SECRET}@h\nthrottle_store_members 2\n{FILE} a\n", "has a password in it already"),
        (f"{STORE}{FILE} nowhere\n", f"f:6: {FILE}: nowhere: No such file or directory"),
        (f"{STORE}{FILE} empty\n", f"f:6: {FILE}: there is no password in the first line of the file"),
        (f"{STORE}{SENTINEL} empty\n", f"f:6: {SENTINEL}: there is no password in the first line of the file"),
        (
            f"throttle_store redis://h\nthrottle_store_members 2\n{SENTINEL} a\n",
            f"f:6: {SENTINEL}: has no effect without +sentinel:// in throttle_store",
        ),
        (
            f"{STORE}throttle_store_tls_ca_file x\n",
            "f:6: throttle_store_tls_ca_file: has no effect without rediss:// in throttle_store",
        ),
        (
            f"{STORE.replace('redis', 'rediss')}throttle_store_tls_private_key_file x\n",
            "f:6: throttle_store_tls_private_key_file: throttle_store_tls_certificate_file is missing",
        ),
    ],
)
def test_what_goes_with_it(lines: str, said: str) -> None:
    found = mistake(lines, a=SECRET, empty=f"\n{SECRET}")
    assert said in found
    assert "\n" not in found
