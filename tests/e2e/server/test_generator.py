"""The benchmark's generator and sink, built with the sanitizers, against the real program: what they report is so."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import authenticated, mta, smtp_driver

from tests import certificates, peers
from tests.program import SECRET, Address, Proxy

pytestmark = pytest.mark.either_form("the generator of the benchmark")

LOADGEN = Path(__file__).parents[3] / "bench" / "loadgen"
SINK, OTHER = "127.0.9.1", "127.0.9.2"
#: Sources of the generator, under the name that it says in EHLO.
NAMED = "".join(f"source s{n} {{\n  ip 127.0.2.{n}\n  ehlo mta1.sender.example.com\n}}\n" for n in range(1, 17))


@pytest.fixture(scope="module")
def loadgen(tmp_path_factory) -> str:
    compiler = peers.program("gcc")
    if not Path("/usr/include/openssl/ssl.h").exists():
        peers.missing("apt-get install libssl-dev")
    program = tmp_path_factory.mktemp("loadgen") / "loadgen"
    checks = ["-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [str(source) for source in sorted(LOADGEN.glob("*.c"))]
    command = [compiler, "-std=gnu11", *checks, "-o", str(program), *sources, "-lm", "-lssl", "-lcrypto"]
    subprocess.run(command, check=True)
    return str(program)


@contextlib.contextmanager
def sink(loadgen: str, host: str = SINK, *more: str) -> Iterator[str]:
    """Where it listens."""
    target = f"{host}:{peers.free_port(host)}"
    process = subprocess.Popen([loadgen, "sink", "--target", target, *more], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield target
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


@pytest.fixture
def tls_sink(loadgen: str, tmp_path: Path) -> Iterator[str]:
    both = tmp_path / "both.pem"
    both.write_bytes(certificates.pem("valid"))
    with sink(loadgen, SINK, "--certificate", str(both), "--key", str(both)) as target:
        yield target


def run(
    loadgen: str, mode: str, target: str, *more: str, fds: tuple[int, ...] = ()
) -> subprocess.CompletedProcess[str]:
    command = [loadgen, mode, "--target", target, *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, pass_fds=fds, check=False)


def report(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["errors"] == 0
    return found


def door(address: Address, *words: str) -> list[str]:
    return ["--proxy", "{}:{}".format(*address), "--handshake", *words]


def test_shared_connections_with_starttls_are_few_and_lose_nothing(loadgen: str, tls_sink: str) -> None:
    with Proxy(f"mode smtp\nreuse_connections_max_cached_per_destination 1000\n{NAMED}") as proxy:
        load = ("--connections", "4", "--warm-up", "64", "--sessions", "96", "--messages", "2")
        found = report(run(loadgen, "load", tls_sink, *door(proxy.proxy_protocol, "v2"), *load))
    assert found["messages"] == 192, "the warm-up is not counted"
    assert found["mx_connections_per_unit"] < 0.25
    assert found["mx_handshakes_per_unit"] == found["mx_connections_per_unit"], "the proxy has encrypted all of them"
    assert found["own_tls_us_per_unit"] == 0


def test_an_mta_encrypts_through_the_proxy(loadgen: str, tls_sink: str) -> None:
    with Proxy("mode tcp\n") as proxy:
        load = ("--connections", "4", "--sessions", "40", "--starttls")
        found = report(run(loadgen, "load", tls_sink, *door(proxy.proxy_protocol, "v2"), *load))
    assert (found["messages"], found["mx_handshakes_per_unit"]) == (40, 1)
    assert 0 < found["own_tls_us_per_unit"] <= found["with_own_tls_us_per_unit"]


def test_what_tls_costs_exim_is_more_than_nothing_and_every_message_comes(tls_sink: str) -> None:
    peers.program("exim4")
    host, port = tls_sink.split(":")
    sink = host, int(port)
    with peers.directory() as directory:
        assert mta.own_tls(sink, 3, directory) > 0
    assert smtp_driver.accepted(sink) == 6


@pytest.mark.parametrize("shape", [(), ("--pipelining",), ("--messages", "3", "--bytes", "60000")])
def test_sessions_through_warm_channels(loadgen: str, shape: tuple[str, ...]) -> None:
    with (
        sink(loadgen) as target,
        Proxy("listen_tls no\n") as proxy,
        authenticated.channels(proxy.native, SECRET, 4) as fds,
    ):
        load = ("--connections", "4", "--sessions", "60", "--fds", ",".join(map(str, fds)), *shape)
        found = report(run(loadgen, "load", target, "--handshake", "native", *load, fds=tuple(fds)))
        assert found["units"] == 60
        assert found["messages"] == (180 if "3" in shape else 60)
        assert found["mx_connections_per_unit"] == 1
        again = report(run(loadgen, "load", target, "--handshake", "native", *load, fds=tuple(fds)))
        assert again["units"] == 60, "the channels are as good as they were"


@pytest.mark.parametrize("depth", [1, 16])
def test_permits_come_as_asked_for(loadgen: str, depth: int) -> None:
    with Proxy("listen_tls no\n") as proxy, authenticated.sessions(proxy.native, SECRET, 3) as sessions:
        fds, incarnations = zip(*sessions, strict=True)
        words = ["--fds", ",".join(map(str, fds)), "--incarnations", ",".join(map(str, incarnations))]
        words += ["--messages", str(depth), "--seconds", "1.2"]
        found = report(run(loadgen, "permits", "127.0.9.1:25", *words, fds=fds))
    assert found["unit"] == "permit"
    assert found["units"] >= 3 * depth
    assert 0 < found["permit_p50_us"] <= found["permit_p99_us"]


def test_what_is_kept_without_its_clients(loadgen: str) -> None:
    with (
        sink(loadgen) as target,
        Proxy(f"mode smtp\nreuse_connections_max_cached_per_destination 1000\n{NAMED}") as proxy,
    ):
        words = ("--connections", "40", "--seconds", "0.2", "--release")
        found = report(run(loadgen, "idle", target, *door(proxy.proxy_protocol, "v2"), *words))
        assert found["units"] == 40
        assert 0 < found["kept"] <= 40


def test_a_message_that_the_sink_does_not_have_fails_the_sample(loadgen: str) -> None:
    """Mail goes to one sink, and another one is asked for it."""
    with sink(loadgen) as asked, sink(loadgen, OTHER) as mail:
        done = run(loadgen, "load", asked, "--proxy", mail, "--connections", "2", "--sessions", "5")
    assert done.returncode == 1
    assert "the sink has 0 messages of 0 octets, sent were 5 of" in done.stderr
