"""The throttle store in the life of the program: it comes and goes, a reload has another, nobody sees a password."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote
from urllib.request import urlopen

import pytest

from tests import engines
from tests.clients import exactly, socks5
from tests.program import ROOT, Proxy
from tests.sinks import GREETING, Raw, greet
from tests.waiting import wait_for

PASSWORD = "an-0pen password:of@the/store%for#tests"
MEMBERS = "throttle_store_members 2\n"


@pytest.fixture
def server() -> Iterator[engines.Engine]:
    with engines.engine(engines.VALKEY_9, password=PASSWORD) as server:
        yield server


def store(server: engines.Engine, more: str = "") -> str:
    return f"throttle_store {server.url()}\n{MEMBERS}{more}"


def connections(server: engines.Engine) -> list[str]:
    """Those of a proxy."""
    return [each["id"] for each in server.client.client_list() if each["name"] == "greenarrow_proxy"]


def wait_connected(server: engines.Engine) -> list[str]:
    return wait_for(lambda: connections(server), 30, "the proxy is connected")


def test_it_is_connected_to_and_let_go_at_the_end(server: engines.Engine) -> None:
    with Proxy(store(server)):
        assert len(wait_connected(server)) == 1
    assert connections(server) == []


def test_without_it_everything_else_goes_on(server: engines.Engine) -> None:
    """At a start, after a reload, and when it comes back."""
    server.kill()
    with Proxy(store(server)) as proxy, Raw(greet) as mx:
        for _ in range(2):
            with socks5(proxy.socks5, mx.endpoint, "127.0.0.5") as sock:
                assert exactly(sock, 8) == GREETING
            proxy.hup(store(server, "log_messages yes\n"))
        server.start()
        wait_connected(server)
        server.kill()
        server.start()
        wait_connected(server)


def test_a_reload_has_another_one_or_keeps_the_one_it_has(server: engines.Engine) -> None:
    with engines.engine(engines.REDIS_7) as other, Proxy(store(server)) as proxy:
        before = wait_connected(server)
        proxy.hup(store(server, "log_messages yes\n"))
        assert connections(server) == before
        proxy.hup(f"throttle_store {server.url(database=2)}\n{MEMBERS}")
        wait_for(lambda: connections(server) not in ([], before), 30, "another database is another connection")
        wait_for(lambda: len(connections(server)) == 1, 30, "the old one is let go")
        proxy.hup(store(other))
        wait_connected(other)
        wait_for(lambda: connections(server) == [], 30, "the old one is let go")
        proxy.hup("")
        wait_for(lambda: connections(other) == [], 30, "none is wanted")


def test_a_password_in_a_file_is_read_anew_by_a_reload(server: engines.Engine, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("wrong\n")
    text = f"throttle_store redis://{server.where}\n{MEMBERS}throttle_store_password_file {file}\n"
    with Proxy(text) as proxy:
        file.write_text(f"{PASSWORD}\n")
        proxy.hup()
        wait_connected(server)


def test_authorities_that_are_of_no_use(server: engines.Engine) -> None:
    bad = f"{store(server).replace('redis:', 'rediss:')}throttle_store_tls_ca_file /nowhere\n"
    with Proxy(store(server)) as proxy:
        before = wait_connected(server)
        assert "throttle_store_tls_ca_file: /nowhere: No such file or directory" in proxy.bad_hup(bad)[0]
        assert connections(server) == before
    with Proxy(bad, ready=False, exit_code=78) as proxy:
        proxy.wait_exit()
    assert "throttle_store_tls_ca_file: /nowhere" in "\n".join(proxy.lines)


def run(*words: str) -> str:
    """What the program says, on both outputs."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "greenarrow_proxy.py"), *words], capture_output=True, text=True, timeout=60
    )
    return f"{done.returncode}\n{done.stdout}\n{done.stderr}"


def test_nobody_sees_the_password(server: engines.Engine) -> None:
    """Neither as it is, nor as it is written in an address; right or wrong, with all that is logged and shown."""
    path = f"@greenarrow-test-{uuid.uuid4()}"
    more = f"control_socket {path}\nlisten_status 127.0.1.9:0\nlog_verbose yes\n"
    with Proxy(store(server, more)) as proxy:
        wait_connected(server)
        said = [run("--check-config", f"--config-filename={proxy.path}")]
        assert said[0].startswith("0\n")
        shows = ("config", "store", "status", "events", "trouble")
        said.extend(run("ctl", "--socket", path, "show", each) for each in shows)
        assert "(secret)" in said[1]
        assert said[1].startswith("0\n")
        host, port = proxy.door("status")
        for page in ("", "metrics", "status.json"):
            with urlopen(f"http://{host}:{port}/{page}", timeout=30) as answer:
                said.append(answer.read().decode())
        server.client.execute_command("ACL SETUSER default on >other resetpass >other")
        server.password = "other"
        server.client.client_kill_filter(_type="normal", skipme=True)
        wrong = run("--check-config", f"--config-filename={proxy.path}")
        assert wrong.startswith("78\n")
        assert "WRONGPASS" in wrong
        proxy.hup(
            f"throttle_store redis://{quote(PASSWORD, safe='')}@{server.where}:x\n{MEMBERS}", outcome="^ERROR reload_f"
        )
    everything = "\n".join([*said, wrong, *proxy.lines])
    for spelled in (PASSWORD, quote(PASSWORD, safe=""), quote(PASSWORD)):
        assert spelled not in everything
        assert spelled.partition("@")[0] not in everything
