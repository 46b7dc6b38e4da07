"""Several runs of the program on one machine, as docs/ha.md has it: each with its own door and source addresses."""

from __future__ import annotations

import contextlib

import pytest

from tests import clients, documents, peers
from tests.interop.conftest import DOCUMENTED_SECRET
from tests.program import SECRET, Proxy
from tests.sinks import GREETING, Raw, greet

MX = "198.51.100.7"


def test_each_has_its_own() -> None:
    peers.in_network_namespace(each_has_its_own)


def each_has_its_own() -> None:
    ip = peers.program("ip")
    assert peers.run(ip, "link", "set", "lo", "up").returncode == 0
    for address in ("10.0.0.1", "192.0.2.1", "192.0.2.2", MX):
        assert peers.run(ip, "address", "add", f"{address}/32", "dev", "lo").returncode == 0
    texts = documents.blocks(documents.section("docs/ha.md", "Several processes on one machine"))
    one, two = (text.replace(DOCUMENTED_SECRET, SECRET) for text in texts)
    flags = ("--allow-destination=198.51.100.0/24", "--destination-port=1-65535")
    limit = "throttle one {\n    max_concurrent_connections 1\n    wait 0.1s\n}\n"
    with (
        Proxy(one + limit, base="", flags=flags) as first,
        Proxy(two + limit, base="", flags=flags) as second,
        Raw(greet, MX) as mx,
        contextlib.ExitStack() as stack,
    ):
        for proxy in (first, second):
            held = stack.enter_context(clients.socks5(proxy.socks5, mx.endpoint))
            assert clients.exactly(held, len(GREETING)) == GREETING
            with pytest.raises(clients.Refused):  # the limit of one connection, for each source
                clients.socks5(proxy.socks5, mx.endpoint)
        assert [peer[0] for peer in mx.peers] == ["192.0.2.1", "192.0.2.2"]
        with Proxy(one, base="", flags=flags, ready=False, exit_code=69) as third:
            third.wait_exit()
            assert third.matching("cannot listen on 10.0.0.1:1080: Address already in use")
