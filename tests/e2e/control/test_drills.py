"""The drills of docs/runbook.md, each done on the real program by typing what the page says, and nothing else."""

from __future__ import annotations

import contextlib
import re
import subprocess
import urllib.request
import uuid

import pytest

from tests import peers
from tests.clients import Refused, dial, socks5
from tests.e2e.control.runbook import PAGE, Drill, drills, steps
from tests.engines import VALKEY_9, engine
from tests.monitoring import alerts
from tests.mx import Mx, close, say
from tests.program import BASE, ROOT, SECRET, Proxy
from tests.sinks import Raw, greet
from tests.waiting import wait_for

SOURCE = "127.0.0.9"
BUSY = {"greeting": say(b"421 4.7.0 Try again later\r\n", close)}
GMAIL = "throttle gmail {\n    destination 127.0.0.0/8\n    max_concurrent_connections 2\n    per nothing\n"
NEW = "another-secret-of-more-than-32-characters"


@pytest.fixture
def path():
    return f"@greenarrow-test-{uuid.uuid4()}"


def at(endpoint):
    return f"{endpoint[0]}:{endpoint[1]}"


def refused_at(proxy, mx, times):
    """So many connections that are greeted with a 421."""
    for _ in range(times):
        with socks5(proxy.socks5, mx.endpoint, SOURCE, user="server-a") as sock:
            while sock.recv(100):
                pass


def connected(proxy, mx, **options):
    """A connection that has got as far as the greeting."""
    sock = socks5(proxy.socks5, mx.endpoint, SOURCE, user="server-a", **options)
    assert sock.recv(3) == b"220"
    return sock


# -- the page itself


def test_each_drill_is_typed_here():
    text = (ROOT / "tests" / "e2e" / "control" / "test_drills.py").read_text()
    assert sorted(drills()) == list("abcdefghijkl")
    assert set(re.findall(r'Drill\("(\w)"', text)) == set(drills())
    assert all(steps(drill) for drill in drills().values())


def test_each_alert_leads_to_a_section():
    anchors = {heading.lower() for heading in re.findall(r"^### (\w+)$", PAGE, re.MULTILINE)}
    led_to = {found for alert in alerts() for found in re.findall(r"runbook_url: docs/runbook.md#(\w+)\n", alert.about)}
    assert all("runbook_url: docs/runbook.md#" in alert.about for alert in alerts())
    assert all(f"{word}: " in alert.about for alert in alerts() for word in ("summary", "description", "severity"))
    assert led_to == anchors


def test_links_within_the_page_lead_somewhere():
    headings = re.findall(r"^##+ (.+)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= anchors


# -- the drills


def test_a_provider_answers_421(path):
    with (
        Proxy(f"control_socket {path}\n") as proxy,
        Mx(BUSY) as mx,
        Drill("a", path, {"198.51.100.7:25": at(mx.endpoint), "192.0.2.1": SOURCE}) as drill,
    ):
        refused_at(proxy, mx, 4)
        drill.watch("receivers_failing", "198.51.100.7:25 refuses or fails", "421 4.7.0 Try again later")
        drill.watch("198.51.100.7:25", "421 4.7.0 Try again later")
        drill.watch("192.0.2.1", "421 4.7.0 Try again later", "yes")


def test_a_source_address_is_gone(path):
    def body():
        commands = [step.typed for step in steps(drills()["b"], "# ")]
        assert [command.split()[:3] for command in commands] == [["ip", "address", "add"]]
        base = BASE.replace("source_ip 127.0.0.0/8, ::1/128", "source_ip 127.0.0.0/8, 192.0.2.1")
        ip = peers.program("ip")
        for words in (
            "link set lo up",
            "link add eth0 type veth peer name eth1",
            "link set eth0 up",
            "address add 192.0.2.1/32 dev eth0",
        ):
            subprocess.run([ip, *words.split()], check=True)
        with Proxy(f"control_socket {path}\n", base) as proxy, Drill("b", path) as drill:
            subprocess.run([ip, *["address", "del", "192.0.2.1/32", "dev", "eth0"]], check=True)
            proxy.wait_line("address: .*192.0.2.1")
            drill.watch("source_missing", "source 192.0.2.1 is not on this machine")
            subprocess.run([ip, *commands[0].split()[1:]], check=True)
            drill.watch("trouble: none")

    peers.in_network_namespace(body)


def test_a_client_has_the_wrong_secret(path, tmp_path):
    secret = tmp_path / "proxy.secret"
    secret.write_text("x" * 40 + "\n")
    with Proxy(f"control_socket {path}\n") as proxy, Raw(greet) as mx:
        values = {
            "10.0.0.1:807": at(proxy.native),
            "/etc/greenarrow/proxy.secret": str(secret),
            "/opt/greenarrow/greenarrow_proxy.conf": str(proxy.path),
        }
        with Drill("c", path, values) as drill:
            for _ in range(5):
                with pytest.raises(Refused):
                    socks5(proxy.socks5, mx.endpoint, user="server-b", password="x" * 40)
            drill.watch("bad_credentials", "clients give a wrong secret or an unknown instance")
            (command,) = [step.typed for step in steps(drills()["c"], "# ")]
            assert "instance=server-b" in proxy.wait_line(command.rpartition(" -g ")[2]).string
            drill.type("unknown instance or wrong secret", code=77)
            assert SECRET not in drill.type("auth_shared_secret  (secret)", "/opt/greenarrow/greenarrow_proxy.conf:8")


def test_descriptors_have_run_out(path):
    text = f"control_socket {path}\nmax_connections 1000\nauth_timeout 60s\n"  # more than there are descriptors for
    with (
        Proxy(text, before="ulimit -n 100") as proxy,
        Raw(greet) as mx,
        connected(proxy, mx),
        contextlib.ExitStack() as stack,
        Drill("d", path, {"198.51.100.7:25": at(mx.endpoint)}) as drill,
    ):
        for _ in range(100):
            stack.enter_context(dial(proxy.socks5))
        drill.watch("accept_errors", "listeners cannot accept", "Too many open files")
        drill.watch("relay", "server-a", "198.51.100.7:25")


def test_a_throttle_is_stuck(path):
    block = GMAIL + '    backoff on "^421" {\n        pause\n        return_after 1h\n    }\n}\n'
    with Proxy(f"control_socket {path}\n{block}") as proxy, Mx(BUSY) as mx, Drill("e", path) as drill:
        refused_at(proxy, mx, 1)
        drill.watch("gmail", "paused")
        drill.watch("gmail", "421 4.7.0 Try again later", "server-a")
        drill.type("the back-off of 1 throttles is over")
        refused_at(proxy, mx, 1)  # it goes out again


def test_a_provider_is_paused(path):
    with Proxy(f"control_socket {path}\n{GMAIL}}}\n") as proxy, Mx() as mx, Drill("f", path) as drill:
        drill.type("gmail is paused for 30m0s")
        with pytest.raises(Refused):
            connected(proxy, mx)
        drill.type("pause gmail", "ticket 4711")
        drill.type("gmail goes on")
        drill.type("gmail is limited to connections=1 for 30m0s")
        with connected(proxy, mx):
            pass
        drill.type("override 2 is over")
        with connected(proxy, mx), connected(proxy, mx):
            pass
        proxy.wait_line('control: pause throttle gmail for 30m .*because="ticket 4711"')


def test_a_connection_is_cut(path):
    with (
        Proxy(f"control_socket {path}\n") as proxy,
        Raw(greet) as mx,
        connected(proxy, mx) as sock,
        Drill("g", path, {"198.51.100.7": mx.endpoint[0], "192.0.2.1": SOURCE}) as drill,
    ):
        table = drill.watch("server-a", "relay", "192.0.2.1")
        drill.values["17"] = table.splitlines()[1].split()[0]
        drill.type("connection 17 is closed")
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(100):
                pass
        proxy.wait_line("^connection .*outcome=closed_by_operator")


def test_a_secret_is_exchanged(path):
    def secrets(*them):
        lines = "".join(f'auth_shared_secret "{each}"\n' for each in them)
        return f"control_socket {path}\n{lines}"

    def write(proxy, text):
        proxy.path.write_text("".join(line for line in BASE.splitlines(True) if not line.startswith("auth_")) + text)

    with Proxy(f"control_socket {path}\n") as proxy, Mx() as mx, Drill("h", path, {"10.0.0.6": SOURCE}) as drill:

        def come(name, secret):
            socks5(proxy.socks5, mx.endpoint, SOURCE, user=name, password=secret, client=SOURCE).close()

        come("server-a", SECRET)
        come("server-b", SECRET)
        write(proxy, secrets(NEW, SECRET))
        drill.type("the new configuration is in force")
        come("server-a", NEW)
        assert "server-a" not in drill.type("server-b", "10.0.0.6", "yes"), "it has the new one"
        come("server-b", NEW)
        drill.type("logins: none")
        write(proxy, secrets(NEW))
        drill.type("the new configuration is in force")
        come("server-b", NEW)
        with pytest.raises(Refused):
            come("server-a", SECRET)


def test_an_upgrade(path):
    with (
        Proxy(f"control_socket {path}\ndrain_timeout 30s\n") as proxy,
        Raw(greet) as mx,
        connected(proxy, mx),
        Drill("i", path, {"/opt/greenarrow/greenarrow_proxy.conf": str(proxy.path)}) as drill,
    ):
        drill.type("greenarrow_proxy 0.1.0")
        drill.type()
        drill.type("stopping: no new connections")
        drill.watch("draining  the proxy is stopping: it accepts nothing new")
        with pytest.raises(ConnectionRefusedError):
            dial(proxy.socks5)


def test_one_instance_is_looked_at(path):
    with (
        Proxy(f"control_socket {path}\n") as proxy,
        Mx() as mx,
        Drill("j", path, {"198.51.100.7:25": at(mx.endpoint), "- 127": "127.0.0.9 127"}) as drill,
    ):
        drill.type("verdict")
        drill.type("the time is over")
        drill.type("the steps of instance=server-a are logged for 10m0s")
        connected(proxy, mx).close()
        pattern = steps(drills()["j"], "# ")[0].typed.partition("'")[2].rstrip("'")
        proxy.wait_line(pattern)
        drill.type("1 ended")


def test_what_is_in_force(path):
    text = f"control_socket {path}\nmax_connections 77\n"
    with Proxy(text) as proxy:
        number = next(at for at, line in enumerate(proxy.path.read_text().splitlines(), 1) if line.startswith("max_"))
        place = {"/opt/greenarrow/greenarrow_proxy.conf:12": f"{proxy.path}:{number}"}
        with Drill("k", path, place) as drill:
            drill.type("max_connections", "77", "/opt/greenarrow/greenarrow_proxy.conf:12")
            good = proxy.path.read_text()
            proxy.path.write_text(good.replace("77", "many"))
            drill.type("max_connections", code=78)
            drill.watch("old_configuration", "an old configuration is in force")
            proxy.path.write_text(good)


# -- the page


def test_six_of_twelve_receivers_with_421_are_red_in_words(path):
    """No figure that somebody has to find, but a sentence on top of the page. (A view is at most a second old.)"""
    with (
        Proxy(f"control_socket {path}\nlisten_status 127.0.0.1:0\n") as proxy,
        contextlib.ExitStack() as stack,
    ):
        busy = [stack.enter_context(Mx(BUSY)) for _ in range(6)]
        good = [stack.enter_context(Mx()) for _ in range(6)]

        def page():
            with urllib.request.urlopen(f"http://{at(proxy.door('status'))}/", timeout=30) as answer:
                return answer.read().decode()

        said = re.compile(r'<li class="b">6 receivers refuse or fail, .+: 421 4.7.0 Try again later')  # b: bad, in red
        assert not said.search(page())
        for one, other in zip(busy, good, strict=True):
            connected(proxy, other).close()
            refused_at(proxy, one, 3)
        wait_for(lambda: said.search(page()), what="the page says it")
        row = proxy.page()["trouble"][0]
        assert (row["kind"], row["recent"]) == ("receivers_failing", 18)


def test_the_throttle_store_is_gone(path):
    assert [step.typed for step in steps(drills()["l"], "# ")] == ["systemctl start valkey"]
    with engine(VALKEY_9) as store:
        text = f"control_socket {path}\nlisten_status 127.0.0.1:0\nmode smtp\n"
        text += f"throttle_store {store.url()}\nthrottle_store_members 2\n"
        gmail = GMAIL + "    scope cluster\n    max_delivery_rate 600/min\n}\n"
        with (
            Proxy(text + gmail) as proxy,
            Raw(greet) as mx,
            connected(proxy, mx),
            Drill("l", path, {"10.0.0.9:6379": store.where}) as drill,
        ):
            wait_for(lambda: proxy.page()["store"]["seen"], 30, "the store knows us")
            store.kill()
            drill.watch("store_degraded", "does not answer, and this proxy goes on with 1/2 of each limit")
            drill.watch("degraded", "valkey", "redis://10.0.0.9:6379")
            drill.watch("gmail", "600/min", "300/min", "alone")
            store.start()
            drill.watch("trouble: none")
