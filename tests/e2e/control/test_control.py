"""The control socket of the real program: tables, roles by the kernel's word, a reload that answers, audit lines."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import uuid

import pytest

from greenarrow_proxy_client import Limits, Session
from greenarrow_proxy_client.throttle import ThrottleTimeout
from tests.clients import Refused, dial, socks5, v2
from tests.mx import Mx, close, say
from tests.program import ROOT, SECRET, Proxy
from tests.sinks import Raw, greet
from tests.waiting import wait_for


@pytest.fixture
def path():
    return f"@greenarrow-test-{uuid.uuid4()}"


def ctl(path, *words, user=None):
    """`greenarrow_proxy ctl`: exit code and both outputs."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "greenarrow_proxy.py"), "ctl", "--socket", path, *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        user=user,
        extra_groups=[] if user is not None else None,
    )
    return done.returncode, done.stdout, done.stderr


def ask(path, line):
    """A client of our own: raw bytes, one line back."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect("\0" + path[1:])
        sock.sendall(line)
        with sock.makefile("rb") as file:
            return json.loads(file.readline())


def test_tables(path):
    said = {"greeting": say(b"421 4.7.0 busy\r\n", close)}
    with Proxy(f"control_socket {path}\n") as proxy, Mx(said) as mx:
        for _ in range(3):
            with socks5(proxy.socks5, mx.endpoint) as sock:
                sock.recv(100)
        wait_for(lambda: "421 4.7.0 busy" in ctl(path, "show", "receivers")[1], what="it has ended")
        code, out, err = ctl(path, "show", "listeners")
        assert (code, err) == (0, "")
        assert "socks5" in out
        code, out, _ = ctl(path, "--json", "show", "receivers", f"{mx.endpoint[0]}:{mx.endpoint[1]}")
        (row,) = json.loads(out)["rows"]
        assert (row["recent"], row["last"]) == (3, "421 4.7.0 busy")
        assert json.loads(ctl(path, "--json", "show", "receivers", "198.51.100.1:25")[1]).get("rows", []) == []
        assert "receiver" in ctl(path, "show", "trouble")[1]
        assert "program.version" in ctl(path, "show", "status")[1]
        assert ctl(path, "show", "nothing")[0] == 64


def test_reload_answers_and_is_remembered(path):
    with Proxy(f"control_socket {path}\nlisten_status 127.0.0.1:0\n") as proxy:
        good = proxy.path.read_text()
        assert ctl(path, "reload")[0] == 0
        proxy.path.write_text(good + "max_connections many\nno_such_directive 1\n")
        code, out, err = ctl(path, "--because", "a try", "reload")
        assert code == 78
        assert "max_connections" in out
        assert "no_such_directive" in out
        assert "old configuration" in err
        proxy.wait_line('control: reload .*because="a try"')
        assert "an old configuration is in force" in ctl(path, "show", "trouble")[1]
        proxy.path.write_text(good)
        assert ctl(path, "--dry-run", "reload") == (0, "would do: reload\n", "")
        assert "an old configuration is in force" in ctl(path, "show", "trouble")[1], "nothing was done"
        assert ctl(path, "reload")[0] == 0
        assert "old configuration" not in ctl(path, "show", "trouble")[1]


def codes_as_another_user(path, groups, *commands):
    """What a user without rights, but in these groups, is told: "" for yes, else the code."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            os.setgroups(groups)
            os.setgid(65534)
            os.setuid(65534)
            answers = [ask(path, json.dumps({"command": command.split()}).encode() + b"\n") for command in commands]
            os.write(writing, json.dumps([answer.get("code", "") for answer in answers]).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading, "rb") as file:
        return json.loads(file.read() or b"null")


def test_others_may_look_and_change_nothing(path):
    with Proxy(f"control_socket {path}\n") as proxy:
        assert codes_as_another_user(path, [], "show listeners", "stop") == ["", "not_allowed"]
        assert proxy.running
        proxy.wait_line("control: refused .*uid=65534")


@pytest.mark.parametrize("many", [[], list(range(20_000, 20_900))])
def test_a_member_of_the_group_may_change_something(path, many):
    """The kernel says in which groups the caller is besides its own, however many these are."""
    with Proxy(f"control_socket {path}\ncontrol_group {grp.getgrgid(1).gr_name}\n"):
        assert codes_as_another_user(path, [*many, 1], "reload") == [""]
        assert codes_as_another_user(path, [*many, 2], "reload") == ["not_allowed"]


def test_lines_that_are_no_request(path):
    with Proxy(f"control_socket {path}\n"):
        for line in (b"GET / HTTP/1.0\r\n\r\n", b"{}\n", b"\xff\n", b'{"v":9,"command":["help"]}\n', b"x" * 20_000):
            assert ask(path, line)["code"] == "bad_request"
        assert ask(path, b'{"command":["help"]}\n')["ok"]


def test_it_answers_during_a_drain_and_is_gone_afterwards(tmp_path):
    file = str(tmp_path / "control")
    with Proxy(f"control_socket {file}\ncontrol_socket_mode 0600\ndrain_timeout 30s\n") as proxy, Raw(greet) as mx:
        assert os.stat(file).st_mode & 0o777 == 0o600
        with socks5(proxy.socks5, mx.endpoint) as sock:
            assert sock.recv(3)
            assert ctl(file, "stop")[0] == 0
            proxy.wait_line("drain: ")
            assert "stopping" in ctl(file, "show", "trouble")[1]
        proxy.wait_exit()
        assert not os.path.exists(file)
        assert ctl(file, "show", "status")[0] == 69


def test_a_reload_changes_who_may_open_it(tmp_path):
    file, name = str(tmp_path / "control"), grp.getgrgid(os.getegid()).gr_name
    with Proxy(f"control_socket {file}\ncontrol_socket_mode 0666\n") as proxy:
        inode = os.stat(file).st_ino
        good = proxy.path.read_text()
        proxy.path.write_text(good.replace("0666", f"0600\ncontrol_group {name}"))
        assert ctl(file, "reload")[0] == 0
        assert (os.stat(file).st_mode & 0o777, os.stat(file).st_ino) == (0o600, inode)
        proxy.path.write_text(good + "control_group no-such-group\n")
        code, out, _ = ctl(file, "reload")
        assert (code, "there is no group no-such-group" in out) == (78, True)
        assert os.stat(file).st_mode & 0o777 == 0o600, "the old configuration is in force"


def test_a_socket_that_is_in_use_is_not_taken(tmp_path):
    file = tmp_path / "control"
    with Proxy(f"control_socket {file}\n"), Proxy(f"control_socket {file}\n", ready=False, exit_code=78) as second:
        second.wait_exit()
        assert any("control_socket" in line and "in use" in line for line in second.stderr_lines)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(file))
    with Proxy(f"control_socket {file}\n"):
        assert ctl(str(file), "help")[0] == 0


def rows(path, *words):
    code, out, err = ctl(path, "--json", *words)
    assert code == 0, (out, err)
    return json.loads(out).get("rows", [])


def test_what_is_in_force_and_where_it_is_written(path):
    with Proxy(
        f"control_socket {path}\nmax_connections 77\nthrottle t {{\n  max_concurrent_connections 5\n}}\n"
    ) as proxy:
        (row,) = rows(path, "show", "config", "max_connections")
        assert (row["value"], row["block"]) == ("77", "")
        assert row["place"].startswith(f"{proxy.path}:")
        assert [row["value"] for row in rows(path, "show", "config", "t")] == ["5"]
        assert rows(path, "show", "config", "idle_timeout")[0]["place"] == "default"
        proxy.path.write_text(proxy.path.read_text().replace("max_connections 77", "max_connections many"))
        assert ctl(path, "reload")[0] == 78
        assert rows(path, "show", "config", "max_connections")[0]["value"] == "77"
        assert ctl(path, "show", "config", "no_such_thing")[0] == 64
        events = rows(path, "show", "events", "reload_failed")
        assert "max_connections" in events[0]["text"]
        assert rows(path, "show", "events", "older=1h") == []


def test_connections_are_seen_and_can_be_ended(path):
    """At a door before the request, while connecting waits for a place, and relayed: each ends at once."""
    block = "throttle one {\n  max_concurrent_connections 1\n  per nothing\n}\n"
    with Proxy(f"auth_timeout 5m\ncontrol_socket {path}\n{block}") as proxy, Mx() as mx:  # who is silent stays
        with socks5(proxy.socks5, mx.endpoint) as relayed, dial(proxy.socks5) as silent:
            assert relayed.recv(100)
            wait_for(
                lambda: {row["state"] for row in rows(path, "show", "connections")} == {"relay", "request"}, what=""
            )
            (row,) = rows(path, "show", "connections", f"destination={mx.endpoint[0]}")
            assert (row["protocol"], row["state"]) == ("socks5", "relay")
            assert rows(path, "show", "connections", "state=request")[0]["client"].endswith(
                f":{silent.getsockname()[1]}"
            )
            with dial(proxy.proxy_protocol) as asking:
                asking.sendall(v2("127.0.0.1", mx.endpoint))
                (waits,) = wait_for(
                    lambda: rows(path, "show", "connections", "state=place"), what="it waits for its place"
                )
                assert ctl(path, "close", "connection", str(waits["id"]))[0] == 0
                assert asking.recv(100) == b""
            wait_for(lambda: len(rows(path, "show", "connections")) == 2, what="it is gone")
            for state in ("relay", "request"):
                (row,) = rows(path, "show", "connections", f"state={state}")
                assert ctl(path, "--because", "it hangs", "close", "connection", str(row["id"]))[0] == 0
            wait_for(lambda: rows(path, "show", "connections") == [], what="all are gone")
            assert silent.recv(10) == b""
            with pytest.raises(ConnectionResetError):
                relayed.recv(10)
        proxy.wait_line("outcome=closed_by_operator")
        proxy.wait_line('control: close connection .*because="it hangs"')
        assert ctl(path, "close", "connection", "1")[0] == 78
        assert ctl(path, "close", "connection", "one")[0] == 64
        assert ctl(path, "close", "connection")[0] == 64


def test_explain_says_what_would_happen(path):
    block = "throttle one {\n  destination 127.0.0.0/8\n  max_concurrent_connections 1\n  per nothing\n}\n"
    more = "instance mta1 {\n  weight 2\n}\ndeny_destination 198.18.7.7\n"
    with Proxy(f"control_socket {path}\n{block}{more}") as proxy, Mx() as mx:
        to = f"{mx.endpoint[0]}:{mx.endpoint[1]}"
        _, out, _ = ctl(path, "explain", "127.0.0.1", to, "instance=mta1")
        assert "mta1, weight 2" in out
        assert "one, counted for all together: 1 connection; not in use now" in out
        assert "connects at once" in out
        with socks5(proxy.socks5, mx.endpoint) as sock:
            assert sock.recv(100)
            wait_for(lambda: "waits under one" in ctl(path, "explain", "127.0.0.1", to)[1], what="its place is taken")
        assert "refused: 198.18.7.7:25 is in a denied range" in ctl(path, "explain", "-", "198.18.7.7")[1]
        assert "NOT on this machine" in ctl(path, "explain", "198.51.100.9", to)[1]
        assert ctl(path, "explain", "127.0.0.1")[0] == 64
        assert "refused: source here is not known" in ctl(path, "explain", "here", to)[1]


def test_steps_of_one_instance_are_logged_for_a_time(path):
    with Proxy(f"control_socket {path}\n") as proxy, Mx() as mx:
        code, out, _ = ctl(path, "--because", "drill", "log", "verbose", "instance=mta-2", "for", "1h")
        assert (code, out.strip()) == (0, "the steps of instance=mta-2 are logged for 1h0m0s")
        (row,) = rows(path, "show", "overrides")
        assert (row["what"], row["because"]) == ("log verbose instance=mta-2", "drill")
        assert 3500 < row["ends"] <= 3600
        for user in ("mta-1", "mta-2"):
            with socks5(proxy.socks5, mx.endpoint, user=user) as sock:
                assert sock.recv(100)
        proxy.wait_line('step .*instance=mta-2 .*message="over: ')
        said = proxy.matching(r"\bstep id=")
        for text in ("has proven its name", "asks for its receiver", "connects", "connected: relayed from now on"):
            assert any(f'message="{text}"' in line for line in said), text
        assert not any("instance=mta-1" in line for line in said)
        assert ctl(path, "log", "verbose", "off")[1].strip() == "1 ended"
        assert rows(path, "show", "overrides") == []
        assert ctl(path, "log", "verbose", "for", "ever")[0] == 64
        assert ctl(path, "log", "verbose", "colour=red")[0] == 64


def test_log_verbose_tells_the_steps_of_all(path):
    with Proxy("log_verbose yes\n") as proxy, Mx() as mx:
        with socks5(proxy.socks5, mx.endpoint) as sock:
            assert sock.recv(100)
        proxy.wait_line('step .*message="over: client_closed')
        proxy.hup("log_verbose no\n")
        before = len(proxy.matching(r"\bstep id="))
        with socks5(proxy.socks5, mx.endpoint) as sock:
            assert sock.recv(100)
        wait_for(lambda: len(proxy.matching(r"\bconnection id=")) == 2, what="it has ended")
        assert len(proxy.matching(r"\bstep id=")) == before


def test_a_trace_shows_steps_as_they_happen_and_ends(path):
    with Proxy(f"control_socket {path}\nmode smtp\n") as proxy, Mx() as mx:
        with socket.socket(socket.AF_UNIX) as caller:
            caller.settimeout(30)
            caller.connect("\0" + path[1:])
            caller.sendall(b'{"command":["trace","destination=' + mx.endpoint[0].encode() + b'"]}\n')
            answers = caller.makefile("rb")
            seen: list[str] = []
            with socks5(proxy.socks5, mx.endpoint) as sock:
                assert sock.recv(100).startswith(b"220")
            while not any("over: " in line for line in seen):
                answer = json.loads(answers.readline())
                assert answer["more"]
                seen += answer.get("lines", [])
            assert any("waits for the receiver's greeting" in line for line in seen)
        code, out, _ = ctl(path, "trace", "for", "100ms")
        assert (code, out.strip()) == (0, "the time is over")
        assert ctl(path, "trace", "for", "2h")[0] == 64


def test_a_prompt_with_completion(path):
    """On a terminal of its own, as somebody types."""
    master, slave = pty.openpty()
    with Proxy(f"control_socket {path}\n"):
        asked = [sys.executable, str(ROOT / "greenarrow_proxy.py"), "ctl", "--socket", path]
        process = subprocess.Popen(asked, stdin=slave, stdout=slave, stderr=slave, close_fds=True)
        os.close(slave)
        seen = b""

        def until(text):
            nonlocal seen
            while text not in seen:
                seen += os.read(master, 4096)
            seen = seen[seen.index(text) + len(text) :]

        try:
            until(b"greenarrow_proxy> ")
            os.write(master, b"show lis\t\n")
            until(b"ADDRESS")
            until(b"greenarrow_proxy> ")
            os.write(master, b"show 'nothing\n")
            until(b"No closing quotation")
            os.write(master, b"quit\n")
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()
            os.close(master)


def test_top_shows_trouble_throttles_and_connections(path):
    block = "throttle one {\n  destination 127.0.0.0/8\n  max_concurrent_connections 1\n}\n"
    with Proxy(f"control_socket {path}\n{block}") as proxy, Mx() as mx, socks5(proxy.socks5, mx.endpoint):
        asked = [sys.executable, str(ROOT / "greenarrow_proxy.py"), "ctl", "--socket", path, "--watch=100ms", "top"]
        with subprocess.Popen(asked, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            wanted = {"trouble: none": 2, "one  ": 2, "RELAY": 0}
            while any(count > 0 for count in wanted.values()):
                line = process.stdout.readline()
                assert line, "it has ended"
                for text in wanted:
                    wanted[text] -= text in line
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0


def test_a_throttle_is_paused_and_limited_by_hand(path):
    block = "throttle one {\n  destination 127.0.0.0/8\n  max_concurrent_connections 9\n  per nothing\n}\n"
    more = "listen_status 127.0.0.1:0\n"
    with Proxy(f"control_socket {path}\n{block}{more}") as proxy, Mx() as mx:
        code, out, _ = ctl(path, "--because", "they are down", "pause", "throttle", "one", "for", "10m")
        assert (code, out.strip()) == (0, "one is paused for 10m0s")
        explained = ctl(path, "explain", "-", "127.0.0.1:2525")[1]
        assert "by hand: pause one; not in use now" in explained
        assert "put off while one is paused by hand" in explained
        with pytest.raises(Refused):
            socks5(proxy.socks5, mx.endpoint)
        proxy.wait_line("throttle one: paused by hand; try again in")
        (row,) = rows(path, "show", "overrides")
        assert (row["id"], row["what"], row["because"]) == ("1", "pause one", "they are down")
        (row,) = wait_for(lambda: rows(path, "show", "throttles", "one"), what="a new look")
        assert row["state"] == "paused"
        assert "pause one, for 9m" in row["reconciled"]
        assert "(they are down)" in row["reconciled"]
        proxy.hup()
        with pytest.raises(Refused):
            socks5(proxy.socks5, mx.endpoint)
        assert ctl(path, "resume", "throttle", "one")[0] == 0
        assert ctl(path, "resume", "throttle", "one")[0] == 78
        with socks5(proxy.socks5, mx.endpoint) as sock:
            assert sock.recv(100)
            code, out, _ = ctl(path, "limit", "throttle", "one", "connections=1", "rate=500/hr", "for", "2h")
            assert (code, out.strip()) == (0, "one is limited to connections=1 rate=500/hr for 2h0m0s")
            (row,) = rows(path, "show", "throttles", "one")
            assert (row["places"], row["limits"]) == (1, [{"amount": 500, "seconds": 3600, "burst": 1}])
            assert "500/hr" in ctl(path, "show", "throttles", "one")[1]
            (row,) = rows(path, "show", "overrides")
            assert row["what"] == "limit one: 1 connections, 500 in 3600 s"
            assert ctl(path, "end", "override", row["id"])[0] == 0
            assert rows(path, "show", "throttles", "one")[0]["places"] == 9
        proxy.wait_line('control: pause throttle one for 10m .*because="they are down"')


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("pause", "throttle", "nothing"), "neither a throttle block nor a rule"),
        (("pause", "throttle", "one", "here"), "not the address of a source"),
        (("pause", "throttle", "one", "for", "ever"), "a duration"),
        (("limit", "throttle", "one", "connections=0"), "connections=5 or rate=500/hr"),
        (("limit", "throttle", "one", "rate=fast"), "connections=5 or rate=500/hr"),
        (("limit", "throttle", "one", "192.0.2.1"), "connections=NUMBER"),
        (("end", "override", "7"), "no override 7"),
    ],
)
def test_what_cannot_be_set_by_hand(door, words, told):
    code, _, err = ctl(door, *words)
    assert code in (64, 78)
    assert told in err
    assert rows(door, "show", "overrides") == []


@pytest.fixture(scope="module")
def door():
    path = f"@greenarrow-test-{uuid.uuid4()}"
    with Proxy(f"control_socket {path}\nthrottle one {{\n  max_concurrent_connections 9\n}}\n"):
        yield path


def test_a_rule_that_instances_have_named_is_paused_and_they_are_told(path):
    with Proxy(f"control_socket {path}\n") as proxy, Session(proxy.native, SECRET, "a") as session:
        throttle = session.throttle("127.0.0.9", Limits("yahoo", ((100, 1),)))
        throttle.acquire(30)
        assert ctl(path, "pause", "throttle", "yahoo", "127.0.0.9")[0] == 0
        wait_for(lambda: rows(path, "show", "throttles", "yahoo")[0]["state"] == "paused", what="it is paused")

        def none_is_left():  # what was granted before may be used
            try:
                throttle.acquire(0.5)
            except ThrottleTimeout:
                return True

        wait_for(none_is_left, what="nothing goes on")
        assert ctl(path, "resume", "throttle", "yahoo", "127.0.0.9")[0] == 0
        throttle.acquire(30)
