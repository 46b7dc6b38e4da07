"""The machine's addresses: the kernel's word against what bind() would say. In a network namespace of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from proxy.net.addresses import Addresses
from tests.loopback.net.relays import open_descriptors

ROOT = Path(__file__).parents[3]

SCRIPT = """
import os, socket, subprocess
import gevent
from proxy.egress import upstream
from proxy.errors import SourceMissing
from proxy.net.addresses import own_addresses

def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)

def binds(host):
    try:
        upstream.bind(host).close()
    except SourceMissing as error:
        assert error.source == host and error.socks_reply == 1
        return False
    return True

def until(condition):
    while not condition():
        gevent.sleep(0.001)

ip("link", "set", "lo", "up")
"""


def in_namespace(script: str) -> str:
    """What the script prints, run where the network is its own."""
    if os.geteuid() or not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("network namespaces need root, unshare and ip")
    command = ["unshare", "--net", sys.executable, "-c", SCRIPT + script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_here_and_what_is_not():
    before = open_descriptors()
    addresses = Addresses()
    assert [host in addresses for host in ("127.0.0.1", "127.9.9.9", "::1")] == [True] * 3
    assert [host in addresses for host in ("198.51.100.9", "2001:db8::9", "8.8.8.8")] == [False] * 3
    addresses.close()
    assert open_descriptors() == before


def test_a_nonlocal_bind_does_not_make_an_address_ours():
    """keepalived's sysctl lets bind() take every address; nothing that is sent from there gets an answer."""
    in_namespace("""
for name in ("ipv4", "ipv6"):
    with open(f"/proc/sys/net/{name}/ip_nonlocal_bind", "w") as file:
        file.write("1")
hosts = ("198.51.100.9", "2001:db8::9")
for host in hosts:
    socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM).bind((host, 0))
assert [binds(host) for host in hosts] == [False, False]
ip("address", "add", "198.51.100.9/32", "dev", "lo")
ip("address", "add", "2001:db8::9/128", "dev", "lo", "nodad")
until(lambda: [binds(host) for host in hosts] == [True, True])  # the kernel tells of IPv6 a little later
ip("route", "add", "local", "203.0.113.0/24", "dev", "lo")
assert binds("203.0.113.77")
ip("address", "del", "198.51.100.9/32", "dev", "lo")
assert [binds(host) for host in hosts] == [False, True]
""")


def test_the_check_of_a_configuration_asks_the_kernel_as_well():
    """What a start cannot use is told, whatever bind() takes; a wildcard is no address."""
    assert (
        in_namespace("""
from proxy.config import load
from proxy.server import check_config
with open("/proc/sys/net/ipv4/ip_nonlocal_bind", "w") as file:
    file.write("1")
ip("address", "add", "198.51.100.8/32", "dev", "lo")
text = (
    "listen_socks5 0.0.0.0:0, [::]:0, 198.51.100.9:2525, 198.51.100.8:2525\\n"
    "allow_from 127.0.0.1\\nsocks5_auth none\\n"
    "source_ip 198.51.100.8, 198.51.100.9\\ndefault_source_ip 198.51.100.9\\n"
)
loaded = load.load(["--config-filename=/f"], {}, lambda name: text)
for finding in check_config.check(loaded):
    if "not an address" in finding.message:
        print(finding.directive, finding.message.split()[0])
""")
        == "listen_socks5 198.51.100.9:2525\nsource_ip 198.51.100.9\ndefault_source_ip 198.51.100.9\n"
    )


def test_it_is_told_when_an_address_comes_and_goes():
    """On two interfaces it goes with the second."""
    assert in_namespace("""
told = []
own_addresses().watch(lambda host: told.append("-" + host), lambda host: told.append("+" + host))
for kind in ("dummy", "ifb", "veth"):  # whichever this kernel has
    if not subprocess.run(["ip", "link", "add", "d0", "type", kind]).returncode:
        break
ip("link", "set", "d0", "up")
ip("address", "add", "198.51.100.9/32", "dev", "lo")
ip("address", "add", "198.51.100.9/32", "dev", "d0")
ip("address", "del", "198.51.100.9/32", "dev", "lo")
ip("address", "add", "198.51.100.10/32", "dev", "lo")
until(lambda: "+198.51.100.10" in told)
ip("address", "del", "198.51.100.9/32", "dev", "d0")
until(lambda: "-198.51.100.9" in told)
print([line for line in told if "198.51" in line])
""").strip() == str(["+198.51.100.9", "+198.51.100.10", "-198.51.100.9"])


def test_news_that_were_lost_are_made_up_for():
    """More changes than the kernel keeps for us: all is read anew, and what differs is told."""
    assert (
        in_namespace("""
addresses = own_addresses()
addresses._news.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
batch = "".join(f"address add 198.51.{n >> 8}.{n & 255}/32 dev lo\\n" for n in range(1000))
subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True)
told = []
addresses.watch(told.append, told.append)
until(lambda: len(told) == 1000)
print(all(f"198.51.{n >> 8}.{n & 255}" in addresses for n in range(1000)))
""").strip()
        == "True"
    )


def test_no_ipv6_at_all_is_a_network_that_cannot_be_reached():
    in_namespace("""
from proxy.errors import Step, UpstreamError
from proxy.model import Endpoint
with open("/proc/sys/net/ipv6/conf/all/disable_ipv6", "w") as file:
    file.write("1")
try:
    upstream.system_source(Endpoint("2a00::1", 25))
except UpstreamError as error:
    assert (error.step, error.socks_reply) == (Step.CONNECT, 3), error
else:
    raise AssertionError("there is a way")
""")
