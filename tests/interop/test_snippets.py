"""Each file of etc/clients delivers the same message, byte for byte, and leaves from the address that it asks for."""

import importlib.util
import re
import shutil
import sys

import pytest

from tests import clients, peers
from tests.interop.conftest import DEFAULT_SOURCE, DOCUMENTED_SECRET, SECRETS
from tests.peers import MESSAGE, SNIPPETS
from tests.program import SECRET
from tests.sinks import Raw, closed_port
from tests.waiting import wait_for

pytestmark = pytest.mark.either_form("the sources of etc/clients")

ENVELOPE = ("from@example.com", "to@example.net")


def endpoint(address):
    return f"{address[0]}:{address[1]}"


def arrived(sink, source):
    """The one message, as it was sent, from there."""
    (message,) = sink.messages
    assert message.content == MESSAGE
    assert message.peer[0] == source
    assert (message.mail_from, *message.rcpt_tos) == ENVELOPE


# -- scripts


def test_curl(proxy, sink, tmp_path):
    peers.program("curl")
    values = {"10.0.0.1:1080": endpoint(proxy.socks5), "198.51.100.7:25": endpoint(sink.endpoint)}
    (tmp_path / "message").write_bytes(MESSAGE)
    done = peers.run(peers.script(tmp_path, "curl.sh", values | SECRETS), *ENVELOPE, tmp_path / "message")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    arrived(sink, DEFAULT_SOURCE)
    proxy.wait_line(rf"^connection .* instance=server-a .*:{sink.endpoint[1]} .*outcome=")


def test_curl_with_other_line_ends(proxy, sink, tmp_path):
    peers.program("curl")
    values = {"10.0.0.1:1080": endpoint(proxy.socks5), "198.51.100.7:25": endpoint(sink.endpoint)}
    (tmp_path / "message").write_bytes(MESSAGE.replace(b"\r\n", b"\n"))
    done = peers.run(peers.script(tmp_path, "curl.sh", values | SECRETS), *ENVELOPE, tmp_path / "message")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    arrived(sink, DEFAULT_SOURCE)


@pytest.mark.parametrize("version", [1, 2])
def test_swaks(proxy, sink, tmp_path, version):
    peers.program("swaks")
    values = {
        "10.0.0.1:808": endpoint(proxy.proxy_protocol),
        "source=192.0.2.1": "source=127.0.0.78",
        "198.51.100.7": sink.endpoint[0],
        "receiver_port=25": f"receiver_port={sink.endpoint[1]}",
    }
    if version == 2:
        values["--proxy-version 1 --proxy-family TCP4"] = "--proxy-version 2 --proxy-family AF_INET"
    (tmp_path / "message").write_bytes(MESSAGE.removesuffix(b"\r\n"))  # it adds one
    done = peers.run(peers.script(tmp_path, "swaks.sh", values), *ENVELOPE, tmp_path / "message")
    assert (done.returncode, done.stderr) == (0, b"")
    arrived(sink, "127.0.0.78")


@pytest.mark.parametrize("line_end", [b"\r\n", b"\n"], ids=["CRLF", "LF"])
def test_python_socks(proxy, sink, tmp_path, line_end):
    values = {
        '("10.0.0.1", 1080)': repr(proxy.socks5),
        '("198.51.100.7", 25)': repr(sink.endpoint),
    }
    script = peers.script(tmp_path, "python_socks.py", values | SECRETS)
    done = peers.run(sys.executable, script, *ENVELOPE, stdin=MESSAGE.replace(b"\r\n", line_end))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    arrived(sink, DEFAULT_SOURCE)


def test_python_socks_refused(proxy, tmp_path):
    """The library tells the proxy's reason, not a time-out."""
    with closed_port() as nobody:
        values = {'("10.0.0.1", 1080)': repr(proxy.socks5), '("198.51.100.7", 25)': repr(nobody)}
        script = peers.script(tmp_path, "python_socks.py", values | SECRETS)
        done = peers.run(sys.executable, script, *ENVELOPE, stdin=MESSAGE)
    assert done.returncode == 1
    assert b"0x05: Connection refused" in done.stderr


@pytest.mark.parametrize("name", sorted(file.name for file in SNIPPETS.glob("*.sh")))
def test_shellcheck(name):
    done = peers.run(peers.program("shellcheck"), SNIPPETS / name)
    assert done.returncode == 0, done.stdout.decode()


# -- GreenArrow: no such program here; the line that its documentation describes, with what stands in the snippet


def greenarrow():
    """(proxy, source, host name) of each ip_address block."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (SNIPPETS / "greenarrow.conf").read_text())
    blocks = re.findall(r"ip_address \S+ \{\n(.*?)\n\}", text, re.DOTALL)
    return [
        tuple(re.search(rf"^\s*{name} (\S+)$", block, re.MULTILINE)[1] for name in names)
        for block in blocks
        for names in [("proxy_server", "smtp_source_ip", "smtp_source_hostname")]
    ]


def test_greenarrow(proxy, sink):
    sources = {"192.0.2.1": "127.0.0.81", "192.0.2.2": "127.0.0.82"}
    for at, source, name in greenarrow():
        assert at == "10.0.0.1:808"
        with clients.dial(proxy.proxy_protocol) as sock:
            header = f"PROXY TCP4 {sources[source]} {sink.endpoint[0]} {sock.getsockname()[1]} {sink.endpoint[1]}\r\n"
            sock.sendall(header.encode())
            smtp = clients.Smtp(sock)
            assert smtp.greeting[0] == 220
            assert smtp.ehlo(name)[0] == 250
            assert smtp.sendmail(ENVELOPE[0], ENVELOPE[1], MESSAGE) == {}
            smtp.quit()
    assert [message.peer[0] for message in sink.messages] == ["127.0.0.81", "127.0.0.82"]
    assert {message.content for message in sink.messages} == {MESSAGE}


# -- KumoMTA: no such program here; the script sends what its sources say, with what stands in the snippet

#: The members of EgressSource in crates/kumod/src/egress_source.rs; an unknown one is an error in KumoMTA.
KUMOMTA_FIELDS = {
    *("name", "ehlo_domain", "source_address", "remote_port", "ha_proxy_server", "ha_proxy_source_address"),
    *("socks5_proxy_server", "socks5_proxy_source_address", "socks5_proxy_username", "socks5_proxy_password"),
    *("suspend_when_unplumbed", "suspend_when_proxy_unhealthy", "ttl"),
}


def kumomta():
    """The sources in kumomta.lua: name → fields."""
    text = re.sub(r"(?m)^\s*--.*\n", "", (SNIPPETS / "kumomta.lua").read_text())
    table = re.search(r"SOURCES = \{\n(.*?)\n\}", text, re.DOTALL)[1]
    sources = re.findall(r"\['(\w+)'\] = \{\n(.*?)\n  \},", table, re.DOTALL)
    fields = r"(\w+) = (?:\{ key_data = )?'([^']*)'(?: \})?,"
    for _, body in sources:
        assert all(re.fullmatch(rf"\s*{fields}", line) for line in body.splitlines()), body
    return {name: dict(re.findall(fields, body)) for name, body in sources}


def kumomta_bytes():
    spec = importlib.util.spec_from_file_location("kumomta_bytes", SNIPPETS / "kumomta_bytes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_fields_of_the_kumomta_snippet():
    sources = kumomta()
    assert list(sources) == ["mail1", "mail2"]
    for name, fields in sources.items():
        assert set(fields) <= KUMOMTA_FIELDS
        assert fields["name"] == name
        # Each way needs both of its fields, and KumoMTA prefers ha_proxy where both ways are given.
        for way in ("ha_proxy", "socks5_proxy"):
            assert (f"{way}_server" in fields) == (f"{way}_source_address" in fields)
        assert ("ha_proxy_server" in fields) != ("socks5_proxy_server" in fields)
    assert sources["mail1"]["socks5_proxy_password"] == DOCUMENTED_SECRET


#: Stands in for KumoMTA: keeps the event's handler, and prints each source that the handler makes.
KUMO = """
local handlers = {}
kumo = {
  on = function(event, handler) handlers[event] = handler end,
  make_egress_source = function(fields) return fields end,
}
dofile(arg[1])
for _, name in ipairs { 'mail1', 'mail2' } do
  for field, value in pairs(handlers.get_egress_source(name)) do
    print(name, field, type(value) == 'table' and value.key_data or value)
  end
end
assert(not pcall(handlers.get_egress_source, 'unknown'))
"""


def test_lua_runs_the_kumomta_snippet(tmp_path):
    """A Lua of its own reads the same fields from it as we do."""
    lua = shutil.which("lua5.4") or shutil.which("lua") or peers.missing("lua is not installed")
    (tmp_path / "kumo.lua").write_text(KUMO)
    done = peers.run(lua, tmp_path / "kumo.lua", SNIPPETS / "kumomta.lua")
    assert (done.returncode, done.stderr) == (0, b"")
    printed = sorted(tuple(line.split("\t")) for line in done.stdout.decode().splitlines())
    assert printed == sorted((name, *field) for name, fields in kumomta().items() for field in fields.items())


@pytest.mark.parametrize("name", ["mail1", "mail2"])
def test_kumomta(proxy, sink, name):
    fields = kumomta()[name]
    source = {"192.0.2.1": "127.0.0.83", "192.0.2.2": "127.0.0.84"}
    if "socks5_proxy_server" in fields:
        assert fields["socks5_proxy_server"] == "10.0.0.1:1080"
        how = ("socks5", proxy.socks5, source[fields["socks5_proxy_source_address"]])
        login = (fields["socks5_proxy_username"], SECRETS[fields["socks5_proxy_password"]])
    else:
        assert fields["ha_proxy_server"] == "10.0.0.1:808"
        how = ("ha_proxy", proxy.proxy_protocol, source[fields["ha_proxy_source_address"]])
        login = ()
    with kumomta_bytes().connect(*how, sink.endpoint, *login) as sock:
        assert clients.send(sock, MESSAGE, ENVELOPE[1])[0] == 250
    arrived(sink, how[2])


def test_kumomtas_very_bytes():
    """Against its sources: methods, login, BIND and CONNECT; the header of version 2 and its length."""
    steps = (  # what it sends, what it is answered
        ("05020002", "0502"),
        ("01 08 7365727665722d61 03 6b6579", "0100"),
        ("05020001 c0000201 0000", "05000001 c0000201 0000"),
        ("05010001 c6336407 0019", "05000001 c0000201 1234"),
    )
    destination = ("198.51.100.7", 25)
    got = []

    def serve(sock):
        for question, answer in steps:
            got.append(clients.exactly(sock, len(bytes.fromhex(question))))
            sock.sendall(bytes.fromhex(answer))

    with Raw(serve) as server:
        kumomta_bytes().connect("socks5", server.endpoint, "192.0.2.1", destination, "server-a", "key").close()
    assert got == [bytes.fromhex(question) for question, _ in steps]
    ipv4 = "0d0a0d0a000d0a515549540a 21 11 000c c0000201 c6336407 0000 0019"
    ipv6 = "0d0a0d0a000d0a515549540a 21 21 0024 20010db8{0}01 20010db8{0}02 0000 0019".format("00" * 11)
    assert header_of("192.0.2.1", destination) == bytes.fromhex(ipv4)
    assert header_of("2001:db8::1", ("2001:db8::2", 25)) == bytes.fromhex(ipv6)


def header_of(source, destination):
    got = []
    with Raw(lambda sock: got.append(clients.read_all(sock))) as server:
        kumomta_bytes().connect("ha_proxy", server.endpoint, source, destination).close()
        wait_for(lambda: got, what="the header")
    return got[0]


@pytest.mark.parametrize(
    ("source", "secret", "status", "says"),
    [
        ("127.0.0.83", SECRET, 0, "220 "),
        ("127.0.0.83", "wrong" * 8, 1, "the proxy refuses name and secret"),
        ("198.51.100.1", SECRET, 1, "BIND refused: 2 (not allowed)"),
        ("::1", SECRET, 1, "CONNECT refused: 8 (wrong address family)"),
    ],
)
def test_the_kumomta_script_by_hand(proxy, sink, source, secret, status, says):
    command = [sys.executable, SNIPPETS / "kumomta_bytes.py", "socks5", endpoint(proxy.socks5), source]
    done = peers.run(*command, endpoint(sink.endpoint), "server-a", stdin=secret.encode())
    assert (done.returncode, done.stderr) == (status, b"")
    assert says in done.stdout.decode()
    assert secret.encode() not in done.stdout


# -- all of them


def test_the_snippets_tell_one_story():
    """The same addresses everywhere, documentation ranges only, and none that no test runs."""
    tested = {
        *("greenarrow.conf", "kumomta.lua", "kumomta_bytes.py", "exim.conf", "exim-sources.conf"),
        *("haproxy.cfg", "haproxy-redirect.cfg", "postfix.nft", "curl.sh", "swaks.sh", "python_socks.py"),
        # tests/e2e/client/test_queue_sender.py
        *("queue_sender.py", "queue_lanes.py", "queue_worker.py", "mail_queue.py", "queue_sender.toml"),
    }
    assert {file.name for file in SNIPPETS.iterdir() if file.is_file()} == tested
    for name in tested:
        text = (SNIPPETS / name).read_text()
        found = set(re.findall(r"\b\d+\.\d+\.\d+\.\d+\b", text))
        assert found <= {"10.0.0.1", "10.0.0.0", "192.0.2.1", "192.0.2.2", "198.51.100.7", "127.0.0.1", "127.0.0.0"}, (
            name
        )
        assert set(re.findall(r'"(0{9,})"', text)) <= {DOCUMENTED_SECRET}, name
