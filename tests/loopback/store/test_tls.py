"""`rediss://`: who is believed, what is shown, and what is said when one side speaks TLS and the other does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
import trustme

from proxy.net.identities import UnfitIdentity, store_tls
from proxy.store import dial
from proxy.store.calls import Fate
from tests import engines
from tests.link import Link
from tests.loopback.store.conftest import Caller, Connect, connected
from tests.loopback.store.fake import Fake
from tests.waiting import wait_for


@pytest.fixture(scope="module")
def server() -> Iterator[engines.Engine]:
    """Debian's is the only one that is built with TLS."""
    with engines.engine(engines.REDIS_7, password="pw", tls=True) as server:
        yield server


@pytest.fixture(scope="module")
def ca(server: engines.Engine) -> str:
    return str(server.path / "ca.pem")


def trouble_of(store: Any) -> Any:
    wait_for(lambda: store.view().trouble, 30, "it is told", gevent.sleep)
    return store.view().trouble


@pytest.mark.usefixtures("patient")
def test_an_authority_that_is_known(server: engines.Engine, ca: str, connect: Connect) -> None:
    caller = Caller(connected(connect(server.url(), store_tls(ca, None, None))), b"tls")
    assert {reply.fate for reply in caller.calls(200)} == {Fate.ANSWERED}
    server.client.client_kill_filter(_type="normal", skipme=True)
    caller.until(Fate.ANSWERED)
    caller.check(server.client.lrange("tls", 0, -1))


def test_an_authority_that_is_not(server: engines.Engine, connect: Connect) -> None:
    trouble = trouble_of(connect(server.url(), store_tls(None, None, None)))
    assert (trouble.step, trouble.where) == ("tls", server.where)
    assert "its certificate is not accepted: self-signed certificate" in trouble.reason


def test_a_certificate_of_another_name(server: engines.Engine, ca: str, connect: Connect) -> None:
    with Link((server.host, server.port)) as link:
        trouble = trouble_of(connect(f"rediss://127.0.0.1:{link.endpoint[1]}", store_tls(ca, None, None)))
    assert "IP address mismatch" in trouble.reason
    with Link((server.host, server.port)) as link:
        trouble = trouble_of(connect(f"rediss://localhost:{link.endpoint[1]}", store_tls(ca, None, None)))
    assert "Hostname mismatch" in trouble.reason


@pytest.mark.usefixtures("patient")
def test_a_server_that_wants_to_see_a_certificate(ca: str, connect: Connect, tmp_path: Path) -> None:
    with engines.engine(engines.REDIS_7, "tls-auth-clients optional", tls=True) as server:
        leaf = engines.certificates.authority().issue_cert("proxy.example")
        (tmp_path / "crt").write_bytes(leaf.cert_chain_pems[0].bytes())
        (tmp_path / "key").write_bytes(leaf.private_key_pem.bytes())
        shown = store_tls(str(server.path / "ca.pem"), str(tmp_path / "crt"), str(tmp_path / "key"))
        server.client.config_set("tls-auth-clients", "yes")
        caller = Caller(connected(connect(server.url(), shown)), b"shown")
        assert caller.call().fate is Fate.ANSWERED
        trouble = trouble_of(connect(server.url(), store_tls(str(server.path / "ca.pem"), None, None)))
        assert trouble.step in ("tls", "login")
        assert "CERTIFICATE_REQUIRED" in trouble.reason.upper().replace(" ", "_")


def test_it_speaks_tls_and_we_do_not(server: engines.Engine, connect: Connect) -> None:
    trouble = trouble_of(connect(server.url().replace("rediss", "redis")))
    assert trouble.step == "login"


def test_we_speak_tls_and_it_does_not(ca: str, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "_HANDSHAKE", 0.2)
    with Fake() as fake:
        trouble = trouble_of(connect(fake.url.replace("redis", "rediss"), store_tls(ca, None, None)))
        assert trouble.step == "tls"
    with engines.engine(engines.VALKEY_9) as plain:
        trouble = trouble_of(connect(plain.url().replace("redis", "rediss"), store_tls(ca, None, None)))
        assert trouble.step == "tls"


def test_a_network_that_breaks_in_the_handshake(server: engines.Engine, ca: str, connect: Connect) -> None:
    with Link((server.host, server.port)) as link:
        link.lose_replies(1000)
        store = connect(f"rediss://127.0.0.1:{link.endpoint[1]}", store_tls(ca, None, None))
        assert trouble_of(store).step == "tls"


@pytest.mark.usefixtures("patient")
def test_sentinels_with_tls(server: engines.Engine, ca: str, connect: Connect, tmp_path: Path) -> None:
    """And a password of their own: they must not be asked with the server's alone."""
    watch = [f"sentinel monitor m {server.host} {server.port} 1", "sentinel auth-pass m pw", "tls-replication yes"]
    sentinel = engines.Engine(engines.REDIS_7, tmp_path, watch, "theirs", True, engines.SENTINEL_PORT)
    sentinel.start()
    try:
        url = f"rediss+sentinel://:pw@{sentinel.where}/m"
        refused = trouble_of(connect(url, store_tls(ca, None, None)))
        assert (refused.step, refused.where) == ("auth", sentinel.where)
        caller = Caller(connected(connect(url, store_tls(ca, None, None), sentinel_password="theirs")), b"sentinel")
        assert caller.call().fate is Fate.ANSWERED
        assert list(caller.store.view().servers) == [server.where]
    finally:
        sentinel.kill()


def test_a_cluster_with_tls(connect: Connect) -> None:
    with engines.engine(engines.REDIS_7, "cluster-enabled yes", "tls-cluster yes", tls=True) as node:
        node.client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        tls = store_tls(str(node.path / "ca.pem"), None, None)
        caller = Caller(connect(node.url().replace("rediss", "rediss+cluster"), tls), b"cluster")
        caller.until(Fate.ANSWERED)


def test_two_with_the_same_files_are_the_same(ca: str, tmp_path: Path) -> None:
    assert store_tls(ca, None, None) == store_tls(ca, None, None)
    (tmp_path / "other").write_bytes(trustme.CA().cert_pem.bytes())
    assert store_tls(ca, None, None) != store_tls(str(tmp_path / "other"), None, None)
    assert store_tls(ca, None, None) != store_tls(None, None, None)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file"), ("x", "certificate"), ("-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n", "")],
)
def test_authorities_that_are_of_no_use(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "ca"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UnfitIdentity, match=said or ".") as caught:
        store_tls(str(path), None, None)
    assert caught.value.directive == "throttle_store_tls_ca_file"
