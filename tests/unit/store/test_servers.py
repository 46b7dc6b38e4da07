"""What servers say of themselves and of a call, and what an operator is told: tables, and no secret anywhere."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.store.remedies import RIGHTS, passes, remedy, sentence
from proxy.store.servers import Server, Trouble, info_fields, ran_nothing, refusal, server_of
from proxy.store.wire import ErrorReply

INFO = (
    b"# Server\r\nredis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:8.1.8\r\nserver_mode:standalone\r\n"
    b"run_id:aaa\r\n\r\n# Replication\r\nrole:master\r\nmaster_replid:bbb\r\n# Memory\r\nmaxmemory:0\r\n"
    b"maxmemory_policy:noeviction\r\nnothing\r\n"
)


def server(**fields: str) -> Server:
    return server_of(info_fields(INFO) | fields)


def test_what_info_says() -> None:
    assert server() == Server("valkey", "8.1.8", "master", "aaa", "bbb", "standalone", "", "")
    assert server().is_master
    replica = server(role="slave", master_host="192.0.2.1", master_port="6379")
    assert (replica.is_master, replica.master) == (False, "192.0.2.1:6379")
    redis = server_of({"redis_version": "7.0.15", "redis_mode": "cluster"})
    assert (redis.kind, redis.version, redis.mode, redis.run_id) == ("redis", "7.0.15", "cluster", "")


def test_another_start_or_another_mastership_is_another_identity() -> None:
    assert len({server().identity, server(run_id="x").identity, server(master_replid="x").identity}) == 3
    assert server(maxmemory="5").identity == server().identity


@pytest.mark.parametrize(
    ("limit", "policy", "evicting"),
    [("0", "allkeys-lru", ""), ("1", "noeviction", ""), ("1", "volatile-ttl", "volatile-ttl"), ("1", "", "")],
)
def test_who_forgets_when_its_memory_is_full(limit: str, policy: str, evicting: str) -> None:
    assert server(maxmemory=limit, maxmemory_policy=policy).evicting == evicting


@pytest.mark.parametrize(
    ("kind", "version", "fits"),
    [
        *(("redis", version, True) for version in ("6.2", "6.2.14", "7.0.15", "10.0.1", "8.0-rc1")),
        *(("redis", version, False) for version in ("6.0.20", "5.0.14", "2.8", "", "x", "6")),
        *(("valkey", version, True) for version in ("7.2", "7.2.4", "8.1.8", "9.1.2")),
        ("valkey", "7.0", False),
    ],
)
def test_which_are_new_enough(kind: str, version: str, fits: bool) -> None:
    assert (Server(kind, version, "master", "", "").too_old == "") == fits


@pytest.mark.parametrize(
    ("text", "nothing"),
    [
        *((code, True) for code in ("NOSCRIPT No matching script.", "LOADING x", "BUSY x", "READONLY x", "NOAUTH x")),
        *((code, True) for code in ("MOVED 1 h:1", "ASK 1 h:1", "CLUSTERDOWN x", "TRYAGAIN x", "CROSSSLOT x", "OOM x")),
        ("NOPERM this user has no permissions to run the 'evalsha' command", True),
        # Out of the middle of a script: Valkey 9, Redis 7 and Redis 6.2 say so in words of their own.
        ("OOM command not allowed when used memory > 'maxmemory'. script: 8f3b, on @user_script:3.", False),
        (
            "ERR ACL failure in script: User poor has no permissions to run the 'hset' command script: 1, on @x:1.",
            False,
        ),
        ("ERR Error running script (call to f_1): @user_script:1: user_script:1: bad argument", False),
        ("READONLY You can't write against a read only replica. script: 8f3b, on @user_script:1.", False),
        ("ERR anything that is not known", False),
        ("UNKILLABLE x", False),
        ("", False),
    ],
)
def test_what_certainly_has_not_run(text: str, nothing: bool) -> None:
    assert ran_nothing(ErrorReply(text.encode())) == nothing


@given(st.text(min_size=4, alphabet=st.characters(codec="utf-8")), st.text(), st.text())
def test_no_secret_is_shown_and_no_control_character(secret: str, before: str, behind: str) -> None:
    reply = ErrorReply(f"ERR unknown command 'AUTH', args: {before}{secret}{behind}".encode("utf-8", "replace"))
    trouble = refusal("auth", "h:1", reply, [secret])
    assert secret not in trouble.reason.replace("(secret)", "")
    assert sentence(trouble).isprintable()
    assert len(trouble.reason) <= 200


def test_a_secret_is_not_half_shown_where_the_text_is_cut() -> None:
    reply = ErrorReply(b"ERR " + b"x" * 192 + b"Tr0ub4dor")
    assert "Tr0" not in refusal("auth", "h:1", reply, ["Tr0ub4dor"]).reason


def replied(step: str, text: str) -> Trouble:
    return Trouble(step, "h:1", text, reply=text)


@pytest.mark.parametrize(
    ("trouble", "words", "passing"),
    [
        (Trouble("resolve", "h:1", "Name or service not known"), "spelled right", True),
        (Trouble("connect", "h:1", "Connection refused", errno.ECONNREFUSED), "nobody listens", True),
        (Trouble("connect", "/x", "Permission denied", errno.EACCES), "unixsocketperm", True),
        (Trouble("connect", "/x", "No such file or directory", errno.ENOENT), "unixsocket", True),
        (Trouble("connect", "h:1", "no answer in 3 s"), "firewall", True),
        (Trouble("sentinel", "h:1", "Connection refused", errno.ECONNREFUSED), "nobody listens", True),
        (Trouble("sentinel", "h:1", "it knows no service x"), "", False),
        (Trouble("login", "h:1", "Connection reset by peer", errno.ECONNRESET), "rediss://", True),
        (Trouble("tls", "h:1", "TLS: WRONG_VERSION_NUMBER"), "speaks no TLS", False),
        (Trouble("tls", "h:1", "its certificate is not accepted: self-signed certificate"), "tls_ca_file", False),
        (Trouble("tls", "h:1", "its certificate is not accepted: Hostname mismatch, ..."), "as its certificate", False),
        (Trouble("tls", "h:1", "its certificate is not accepted: certificate has expired"), "renew", False),
        (Trouble("tls", "h:1", "TLS: TLSV13_ALERT_CERTIFICATE_REQUIRED"), "tls_certificate_file", False),
        (Trouble("tls", "h:1", "no handshake within 2 s"), "tls-port", False),
        (Trouble("role", "h:1", "it is a replica"), "", False),
        (replied("auth", "WRONGPASS invalid"), "user or password", False),
        (replied("auth", "NOAUTH Authentication required"), "throttle_store_password_file", False),
        (replied("auth", "ERR AUTH <password> called without any password configured"), "it has none", False),
        (replied("login", "DENIED Redis is running in protected mode"), "requirepass", False),
        (replied("login", "ERR max number of clients reached"), "maxclients", False),
        (replied("select", "ERR DB index is out of range"), "fewer databases", False),
        (replied("info", "LOADING Redis is loading the dataset in memory"), "soon", True),
        (replied("info", "NOPERM User x has no permissions"), RIGHTS, False),
        (replied("call", "ERR unknown command 'EVALSHA'"), "disabled or renamed", False),
        (replied("sentinel", "ERR unknown command 'SENTINEL'"), "no Sentinel", False),
        (replied("call", "MOVED 1 h:1"), "redis+cluster://", False),
        (replied("call", "ERR something of another program"), "", False),
    ],
)
def test_what_to_do_about_it(trouble: Trouble, words: str, passing: bool) -> None:
    found = remedy(trouble)
    assert (words in found) if words else found == ""
    assert passes(trouble) == passing
    assert sentence(trouble).startswith(f"{trouble.where}: {trouble.reason}")
