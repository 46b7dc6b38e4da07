"""The status listener of the real program: page, JSON, metrics and terminal agree with what two MTAs really do."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import signal
import smtplib
import socket
import subprocess
import sys
import threading

import jsonschema
import pytest
from prometheus_client.parser import text_string_to_metric_families

from greenarrow_proxy_client import Session
from greenarrow_proxy_client.throttle import Limits
from proxy.stats import COUNTED
from tests.clients import Refused, Smtp, dial, socks5
from tests.monitoring import alerts, queries, selectors
from tests.mx import Mx, close, say, usual
from tests.program import BASE, ROOT, SECRET, Proxy
from tests.sinks import Raw, Sink, echo, greet
from tests.waiting import wait_for

STATUS = "listen_status 127.0.0.1:0\n"
SOURCE = "127.0.0.9"


@pytest.fixture(scope="module")
def proxy():
    block = "throttle everyone {\n    max_concurrent_connections 50\n}\n"
    with Proxy(STATUS + block) as it:
        yield it


def get(proxy, path, method="GET", host="127.0.0.1"):
    connection = http.client.HTTPConnection(*proxy.door("status"), timeout=30, source_address=(host, 0))
    with contextlib.closing(connection):
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


def view(proxy):
    status, headers, body = get(proxy, "/status.json")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    return json.loads(body)


def metrics(proxy):
    status, headers, body = get(proxy, "/metrics")
    assert (status, headers["Content-Type"].split(";")[0]) == (200, "text/plain")
    samples = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            key = (sample.name.removeprefix("greenarrow_proxy_"), *sorted(sample.labels.values()))
            assert key not in samples
            samples[key] = sample.value
    return samples


def raw(proxy, data, host="127.0.0.1"):
    """What comes back for these bytes until the end of the file."""
    with socket.create_connection(proxy.door("status"), 20, (host, 0)) as sock:
        answer = b""
        with contextlib.suppress(OSError):  # it may be closed, or reset, before all is sent
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while chunk := sock.recv(65536):
                answer += chunk
        return answer


def command(*arguments):
    """`greenarrow_proxy`; exit code and both outputs."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GREENARROW_PROXY_")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "greenarrow_proxy.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env=environ,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def address(proxy):
    return "{}:{}".format(*proxy.door("status"))


# -- the truth, seen three ways


def test_two_instances_under_one_throttle(proxy):
    with (
        Sink() as sink,
        Session(proxy.native, SECRET, "server-a") as a,
        Session(proxy.native, SECRET, "server-b") as b,
    ):
        limits = [Limits("yahoo", [(3600, 3600)], 3, mode="sum"), Limits("yahoo", [(1800, 3600)], 1, mode="sum")]
        one, two = (session.throttle(SOURCE, limit) for session, limit in zip((a, b), limits, strict=True))
        assert one.wait_until_registered(30)
        assert two.wait_until_registered(30)
        with contextlib.ExitStack() as stack:
            for session, throttle, count in ((a, one, 2), (b, two, 1)):
                for _ in range(count):
                    smtp = session.smtp([sink.endpoint], "mta.example.com", source_ip=SOURCE, throttles=[throttle])
                    stack.callback(smtp.close)
            two.backlog(ram=7, bounce=2, disk=1)

            def seen():
                now = view(proxy)
                return now if [row["ram"] for row in now["sessions"]] == [0, 7] else None

            now = wait_for(seen, what="both sessions and the backlog of one")
            (row,) = [row for row in now["throttles"] if row["name"] == "yahoo"]
            assert (row["source"], row["kind"], row["reconciled"]) == (SOURCE, "instances", "sum of 2")
            assert row["limits"] == [{"amount": 5400, "seconds": 3600, "burst": 1}]
            assert (row["places"], row["used"], row["waiting"], row["place_use"]) == (4, 3, 0, 0.75)
            parts = [(each["name"], each["places"], each["mode"], each["used"]) for each in row["instances"]]
            assert parts == [("server-a", 3, "sum", 2), ("server-b", 1, "sum", 1)]
            (own,) = [row for row in now["throttles"] if row["name"] == "everyone"]
            assert (own["kind"], own["source"], own["places"], own["used"]) == ("proxy", SOURCE, 50, 3)
            assert [each["name"] for each in own["instances"]] == ["server-a", "server-b"]
            assert now["connections"]["active"] == 3
            assert now["manager"]["sessions"] == 2
            assert (now["manager"]["ram"], now["manager"]["bounce"], now["manager"]["disk"]) == (7, 2, 1)
            log = proxy.status()
            assert f"manager({now['program']['incarnation']})" in "".join(log)
            assert "backlog(ram=7 bounce=2 disk=1)" in next(line for line in log if "manager(" in line)

            figures = metrics(proxy)
            assert figures["backlog", "ram"] == 7
            assert figures["session_backlog", "server-b"] == 10
            assert figures["remote_connections", "active"] == 3
            assert figures["sessions",] == 2
            assert figures["open_connections", "127.0.1.1:{}".format(*proxy.native[1:]), "native"] == 5

            code, out, err = command("--status", address(proxy))
            assert (code, err) == (0, "")
            lines = [line.split() for line in out.splitlines()]
            throttle = next(at for at, words in enumerate(lines) if words[:2] == ["yahoo", SOURCE])
            assert "5400/hr, 4 connections  sum of 2" in out
            assert "  3 of 4  " in out.splitlines()[throttle]
            assert lines[throttle + 1][:5] == ["server-a", "3600/hr,", "3", "connections", "sum"]
            assert lines[throttle + 2][:5] == ["server-b", "1800/hr,", "1", "connection", "sum"]
            session = next(words for words in lines if words[:1] == ["server-b"] and "127.0.0.1" in words)
            assert session[5:8] == ["7", "2", "1"]

            page = get(proxy, "/")[2].decode()
            for text in ("yahoo", SOURCE, "server-a", "server-b", "sum of 2", "5400/hr, 4 connections", "3 of 4"):
                assert f">{text}<" in page
            assert page.count("<table>") == page.count("</table>") >= 4


def test_one_that_waits_is_shown_first(proxy):
    with Raw(greet) as mx, Session(proxy.native, SECRET, "server-c") as session:
        throttle = session.throttle(SOURCE, Limits("narrow", (), 1))
        assert throttle.wait_until_registered(30)
        with session.connect([mx.endpoint], source_ip=SOURCE, throttles=[throttle]) as first:
            assert first.recv(8)
            with contextlib.ExitStack() as stack:
                waiting = []

                def ask():
                    waiting.append(session.connect([mx.endpoint], source_ip=SOURCE, throttles=[throttle]))
                    stack.callback(waiting[-1].close)

                thread = threading.Thread(target=ask)
                thread.start()
                try:

                    def seen():
                        row = view(proxy)["throttles"][0]
                        return row if row["waiting"] else None

                    row = wait_for(seen, what="a request that waits")
                    assert (row["name"], row["waiting"], row["used"], row["places"]) == ("narrow", 1, 1, 1)
                    first.close()
                    thread.join(30)
                    assert len(waiting) == 1
                finally:
                    first.close()
                    thread.join(30)


def test_cached_connections(proxy):
    with Sink() as sink, Session(proxy.native, SECRET, "server-d") as session:

        def send():
            smtp = session.smtp([sink.endpoint], "mta.example.com", source_ip=SOURCE, tenant="a-secret-user")
            smtp.sendmail("a@example.com", ["b@example.net"], b"Subject: x\r\n\r\nx\r\n")
            assert smtp.release(wait=True) == "kept"

        send()
        now = wait_for(lambda: (it := view(proxy))["pool"]["keys"] and it, what="a connection that is kept")
        (key,) = now["pool"]["keys"]
        assert (key["source"], key["destination"]) == (SOURCE, "{}:{}".format(*sink.endpoint))
        assert (key["ehlo_name"], key["tenant"], key["connections"]) == ("mta.example.com", True, 1)
        send()
        now = wait_for(lambda: (it := view(proxy))["pool"]["hits"] and it, what="a hit")
        hits = now["pool"]
        counters = now["counters"]
        assert hits["reuse_ratio"] == counters["reused"] / (counters["reused"] + counters["fresh"]) > 0
        figures = metrics(proxy)
        assert figures["pool_lookups_total", "hit"] >= 1
        assert figures["pool_oldest_seconds",] > 0
        for path in ("/", "/status.json", "/metrics"):
            assert b"a-secret-user" not in get(proxy, path)[2]


def test_messages_without_a_permit_are_counted():
    with Proxy(STATUS) as proxy, Sink() as sink, Session(proxy.native, SECRET, "server-e") as session:
        throttle = session.throttle(SOURCE, Limits("counted", [(20, 1)]))
        assert throttle.wait_until_registered(30)
        # Nobody is accused in the first two seconds: the permits may be those of the run before.
        wait_for(lambda: view(proxy)["program"]["uptime"] > 3)
        with session.smtp([sink.endpoint], "mta.example.com", source_ip=SOURCE, throttles=[throttle]) as smtp:
            for permitted in (True, False, False, True, False):
                smtp.permit = throttle.acquire(30) if permitted else None
                smtp.sendmail("a@example.com", ["b@example.net"], b"Subject: x\r\n\r\nx\r\n")
        figures = wait_for(lambda: (it := metrics(proxy))["messages_total",] == 5 and it, what="all are counted")
        assert figures["messages_without_permit_total",] == 3
        # A view is at most a second old.
        now = wait_for(lambda: (it := view(proxy))["counters"]["messages_without_permit"] == 3 and it)
        assert now["manager"]["without_permit"] == 3
        assert [row["without_permit"] for row in now["sessions"]] == [3]
        assert "3 messages were sent without a permit" in command("--status", address(proxy))[1]


@pytest.mark.parametrize("mode", ["tcp", "smtp"])
def test_what_became_of_messages_is_counted_by_throttle(mode):
    """By a native session's own throttle and a block in mode tcp, by the block for a client of SOCKS in mode smtp."""
    script = {"dot": [usual, say(b"451 4.7.1 later\r\n"), say(b"550 5.7.1 never\r\n"), usual]}
    block = "throttle everyone {\n    max_concurrent_connections 50\n}\n"
    with contextlib.ExitStack() as stack:
        mx = stack.enter_context(Mx(script))
        proxy = stack.enter_context(Proxy(STATUS + block + f"mode {mode}\n"))
        if mode == "smtp":
            smtp = Smtp(socks5(proxy.socks5, mx.endpoint, SOURCE))
            smtp.ehlo()
            wanted = {"everyone"}
        else:
            session = stack.enter_context(Session(proxy.native, SECRET, "server-f"))
            throttle = session.throttle(SOURCE, Limits("named", [(100, 1)]))
            assert throttle.wait_until_registered(30)
            smtp = session.smtp([mx.endpoint], "mta.example.com", source_ip=SOURCE, throttles=[throttle])
            wanted = {"everyone", "named"}
        for code in (250, 451, 550, 250):
            with contextlib.nullcontext() if code == 250 else pytest.raises(smtplib.SMTPDataError):
                smtp.sendmail("a@example.com", ["b@example.net"], b"Subject: x\r\n\r\nx\r\n")
        smtp.quit()

        def told():
            fates = ("messages_accepted", "messages_deferred", "messages_rejected")
            return {row["name"]: [row[fate] for fate in fates] for row in view(proxy)["throttles"]}

        wait_for(lambda: told() == {name: [2, 1, 1] for name in wanted}, what="all are counted")


def test_reloads_are_counted_good_and_bad_ones():
    with Proxy(STATUS) as own:
        own.hup()
        own.hup()
        assert own.bad_hup(STATUS + "nonsense 1\n")
        figures = metrics(own)
        assert (figures["reloads_total",], figures["reloads_failed_total",]) == (2, 1)


def test_counters_in_json_and_metrics(proxy):
    before = metrics(proxy)
    with Raw(echo) as mx, socks5(proxy.socks5, mx.endpoint) as sock:
        sock.sendall(b"x" * 1000)
        assert sock.recv(10)

    def after():
        figures = metrics(proxy)
        key = "accepted_connections_total", "socks5"
        return figures if figures.get(key, 0) > before.get(key, 0) else None

    figures = wait_for(after, what="an accepted connection")
    assert figures["fresh_connections_total",] > before["fresh_connections_total",]
    wait_for(lambda: metrics(proxy)["bytes_up_total",] >= before["bytes_up_total",] + 1000, what="bytes")
    assert view(proxy)["counters"].keys() == {*COUNTED, "messages_without_permit", "backoffs"}
    assert figures["process_resident_memory_bytes",] > 1e6
    assert figures["process_open_fds",] > 10


def test_the_json_is_as_its_schema_says(proxy):
    schema = json.loads((ROOT / "docs" / "status.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    with Raw(echo) as mx, socks5(proxy.socks5, mx.endpoint):
        assert [str(error) for error in validator.iter_errors(view(proxy))] == []
    code, out, _ = command("--status", address(proxy), "--json")
    assert code == 0
    assert [str(error) for error in validator.iter_errors(json.loads(out))] == []
    assert list(validator.iter_errors({"program": {}}))


def test_labels_of_a_closed_vocabulary_are_there_from_the_start():
    with Proxy(STATUS) as own:
        figures = metrics(own)
    assert figures["failed_total", "bind"] == 0
    assert figures["refused_total", "bad_credentials"] == 0
    assert figures["ended_connections_total", "greeting_4xx"] == 0
    assert figures["accepted_connections_total", "redirect"] == 0


def test_histograms_and_what_is_told_by_instance_and_source():
    with Proxy(STATUS + "mode smtp\nthrottle all {\n  max_concurrent_connections 5\n}\n") as own, Mx() as mx:
        with socks5(own.socks5, mx.endpoint, user="mta-1") as sock, sock.makefile("rwb", buffering=0) as file:
            assert file.readline().startswith(b"220")
            for line in (b"EHLO a.example", b"MAIL FROM:<>", b"RCPT TO:<b@example.net>", b"DATA", b"\r\n.", b"QUIT"):
                file.write(line + b"\r\n")
                while file.readline()[3:4] == b"-":
                    pass
        with pytest.raises(Refused), socks5(own.socks5, ("127.0.0.1", 1), user="mta-2") as sock:
            assert sock.recv(100)
        figures = wait_for(
            lambda: (found := metrics(own)).get(("instance_connections_total", "mta-1")) and found, what="it has ended"
        )
        assert figures["session_seconds_count",] == 1
        assert figures["connect_seconds_count",] == 1
        assert figures["connect_seconds_bucket", "+Inf"] == 1
        assert figures["place_seconds_count",] >= 1
        assert figures["slot_seconds_count",] == 1
        assert figures["session_messages_sum",] == 1
        assert figures["session_bytes_sum",] > 30
        assert figures["turn_seconds_count",] > 10
        assert figures["source_connections_total", "", "127.0.0.1"] == 1
        assert figures["instance_failed_total", "connect", "mta-2"] == 1
        assert figures["source_failed_total", "", "127.0.0.1", "connect"] == 1
        with socks5(own.socks5, mx.endpoint, user="mta-1") as sock:
            assert sock.recv(100)
            figures = metrics(own)
            assert figures["instance_active", "mta-1"] == figures["source_active", "127.0.0.1"] == 1


def test_which_configuration_is_in_force_since_when():
    def in_force(own):
        figures = metrics(own)
        (digest,) = [key[1] for key in figures if key[0] == "config_info"]
        return digest, figures["config_last_reload_success_timestamp_seconds",]

    with Proxy(STATUS) as own:
        first, began = in_force(own)
        own.hup(STATUS + "max_connections 77\n")
        second, reloaded = in_force(own)
        assert second != first
        assert reloaded >= began > 1_600_000_000
        assert own.bad_hup(STATUS + "nonsense 1\n")
        assert in_force(own) == (second, reloaded)
        assert metrics(own)["config_last_reload_successful",] == 0
        assert view(own)["program"]["configuration"] == second
        own.hup(STATUS)
        assert metrics(own)["config_last_reload_successful",] == 1


def test_what_alerts_and_dashboard_look_at_exists(proxy):
    """`tests/interop/test_prometheus.py` looks at their labels, too."""
    known = re.findall(r"^# TYPE (\w+) ", get(proxy, "/metrics")[2].decode(), re.MULTILINE)
    expressions = [each.expression for each in (*alerts(), *queries())]
    wanted = {
        re.sub(r"_bucket$", "", selector.partition("{")[0])
        for expression in expressions
        for selector in selectors(expression)
    }
    assert len(wanted) >= 30
    of_a_store = {each for each in wanted if each.startswith("greenarrow_proxy_store_")}  # there with one, see there
    assert wanted - of_a_store <= set(known), wanted - set(known)


def test_the_documented_alerts_are_those_of_the_file():
    page = (ROOT / "docs" / "operations.md").read_text()
    documented = re.findall(r"^\| `(Proxy\w+)` \| `(.+?)` \| .+ \|$", page, re.MULTILINE)
    assert documented == [(alert.name, alert.expression) for alert in alerts()]


def test_trouble_is_a_metric_of_each_kind_that_is_documented(proxy):
    page = (ROOT / "docs" / "operations.md").read_text()
    table = page[page.index("| kind | what it says |") : page.index("The view is at most a second old")]
    kinds = {
        kind for row in table.splitlines()[2:] for kind in re.findall(r"`(\w+)`", row.split("|")[1:2][0] if row else "")
    }
    assert {key[1] for key in metrics(proxy) if key[0] == "trouble"} == kinds
    with Proxy(STATUS) as own:
        assert metrics(own)["trouble", "old_configuration"] == 0
        own.bad_hup(STATUS + "nonsense 1\n")
        assert metrics(own)["trouble", "old_configuration"] == 1


def test_watch_shows_it_again_until_it_is_interrupted(proxy):
    asked = [sys.executable, str(ROOT / "greenarrow_proxy.py"), f"--status={address(proxy)}", "--watch=100ms"]
    with subprocess.Popen(asked, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = 0
        while seen < 3:
            line = process.stdout.readline()
            assert line, "it has ended"
            seen += line.startswith("greenarrow_proxy ")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


@pytest.mark.parametrize("flags", [("--watch=soon",), ("--watch=1ms",)])
def test_watch_says_what_it_wants(proxy, flags):
    code, _, err = command("--status", address(proxy), *flags)
    assert code == 64
    assert "--watch: a duration" in err


@pytest.mark.parametrize("flag", ["--json", "--watch"])
def test_flags_that_belong_to_status(flag):
    code, _, err = command("--check-config", flag)
    assert code == 64
    assert f"{flag}: only with --status" in err


def test_the_status_may_have_more_names_and_health_has_any():
    with Proxy(STATUS + "listen_status_name proxy1.example.com\n") as own:
        for name, answer in (("proxy1.example.com:809", b"200"), ("proxy2.example.com", b"421")):
            assert raw(own, f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode()).startswith(b"HTTP/1.1 " + answer)
            assert raw(own, f"GET /healthz HTTP/1.1\r\nHost: {name}\r\n\r\n".encode()).startswith(b"HTTP/1.1 200")
        own.hup(STATUS)
        assert raw(own, b"GET / HTTP/1.1\r\nHost: proxy1.example.com\r\n\r\n").startswith(b"HTTP/1.1 421")


def test_secrets_are_nowhere(proxy):
    for path in ("/", "/status.json", "/metrics", "/healthz", "/nothing"):
        _, headers, body = get(proxy, path)
        assert SECRET.encode() not in body
        assert SECRET not in str(headers)
    _, out, err = command("--status", f"--config-filename={proxy.path}", address(proxy))
    assert SECRET not in out + err


# -- HTTP


@pytest.mark.parametrize("path", ["/", "/status.json", "/metrics", "/healthz"])
def test_head_and_what_the_headers_say(proxy, path):
    status, headers, body = get(proxy, path, "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 0
    assert "Server" not in headers
    assert (headers["Cache-Control"], headers["Connection"]) == ("no-store", "close")
    assert headers["X-Content-Type-Options"] == "nosniff"
    answer = raw(proxy, f"HEAD {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    assert answer.endswith(b"\r\n\r\n"), "no body on the wire either"
    assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("path", ["/nothing", "/status", "//", "/../etc/passwd", "/%2e%2e/", "/status.json/", "*"])
def test_other_paths_are_404(proxy, path):
    status, _, body = get(proxy, path)
    assert (status, body) == (404, b"not found\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "get"])
def test_nothing_can_be_changed(proxy, method):
    answer = raw(proxy, f"{method} / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 3\r\n\r\nabc".encode())
    head = answer.split(b"\r\n\r\n")[0]
    assert head.startswith(b"HTTP/1.1 405 ")
    assert b"Allow: GET, HEAD" in head


def test_a_query_is_ignored_and_one_connection_is_one_request(proxy):
    answer = raw(proxy, b"GET /healthz?verbose=1 HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: keep-alive\r\n\r\n" * 3)
    assert answer.count(b"HTTP/1.1 200 OK") == 1
    assert answer.endswith(b"\r\n\r\nok\n")


BAD = [
    b"\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/x\r\n\r\n",
    b"GET / HTTP/1\r\n\r\n",
    b"GET / nonsense\r\n\r\n",
    b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
    b"GET / HTTP/1.1\r\n: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffff\r\n",
    b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
    b"GET / HTTP/1.1\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 10000000\r\n\r\n" + b"x" * 1_000_000,
    b"\x00" * 50_000,
    b"\xff" * 20,
    "GET /\u20ac HTTP/1.1\r\n\r\n".encode(),
    b"GET /%00%0d%0aX: y HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nExpect: 100-continue\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    b"",
]


@pytest.mark.parametrize("request_", BAD, ids=range(len(BAD)))
def test_bad_requests_get_an_answer_or_nothing_and_leave_no_trace(proxy, request_):
    mark = len(proxy.lines)
    answer = raw(proxy, request_)
    assert b"Traceback" not in answer
    assert not answer or re.match(rb"HTTP/1\.1 (100|200|400|404|405|414) ", answer)
    assert get(proxy, "/healthz")[0] == 200
    # What a start warns of is logged after it has begun to serve.
    told = [line for line in proxy.lines[mark:] if not line.startswith("WARNING config: ")]
    assert told == [], "no access log, no errors"


def test_random_bytes(proxy):
    random_ = random.Random(7)
    good = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\nTransfer-Encoding: x\r\n\r\n"
    mark = len(proxy.lines)
    for _ in range(150):
        request = bytearray(good)
        for _ in range(random_.randint(1, 6)):
            request[random_.randrange(len(request))] = random_.randrange(256)
        answer = raw(proxy, bytes(request[: random_.randint(1, len(request))]))
        assert not answer or re.match(rb"HTTP/1\.1 (200|400|404|405|421) ", answer), request
    assert [line for line in proxy.lines[mark:] if "reason=host_not_allowed" not in line] == []
    wait_for(lambda: view(proxy)["listeners"][3]["open_connections"] == 1, what="only the one who asks is connected")
    assert view(proxy)["counters"]["internal_errors"] == 0


def test_silent_and_slow_clients_keep_nobody_away(proxy):
    before = proxy.fds()
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(dial(proxy.door("status"))) for _ in range(100)]
        for sock in silent[::2]:
            sock.sendall(b"GET / HT")
        for _ in range(5):
            assert get(proxy, "/healthz")[0] == 200
        assert silent[0].recv(10) == b"", "the oldest makes room"
    wait_for(lambda: proxy.fds() <= before, what="all are closed")


# -- who may look


def test_only_the_allow_list_may_look():
    with Proxy(STATUS + "listen_status_allow_from 127.0.0.7\n") as proxy:
        assert get(proxy, "/healthz", host="127.0.0.7")[0] == 200
        assert raw(proxy, b"GET / HTTP/1.0\r\n\r\n", host="127.0.0.8") == b""
        line = proxy.wait_line(r"^WARNING refused .*protocol=status .*reason=client_not_allowed")
        assert "127.0.0.8" in line.string
        now = json.loads(get(proxy, "/status.json", host="127.0.0.7")[2])
        assert now["counters"]["refused"] == {"client_not_allowed": 1}
        code, out, err = command("--status", address(proxy))
        assert (code, out) == (69, "")
        says = "closed without an answer; is this address in listen_status_allow_from?"
        assert err == f"greenarrow_proxy: {address(proxy)}: {says}\n"
        proxy.hup(STATUS)
        assert get(proxy, "/healthz")[0] == 200


def test_a_web_page_cannot_read_it_by_a_name_of_its_own():
    with Proxy(STATUS) as proxy:
        port = proxy.door("status")[1]
        machine = socket.gethostname()
        for path in ("/", "/status.json", "/metrics"):
            for host in (f"evil.example:{port}", f"{machine}.evil.example"):
                answer = raw(proxy, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                head, _, body = answer.partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 421 ")
                assert body.startswith(f"asked as {host.partition(':')[0]}".encode().lower())
            for host in (f"127.0.0.1:{port}", f"localhost:{port}", machine, f"[::1]:{port}"):
                assert raw(proxy, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()).startswith(b"HTTP/1.1 200 ")
        line = proxy.wait_line(r"^WARNING refused .*protocol=status .*reason=host_not_allowed").string
        assert "evil.example" in line
        assert metrics(proxy)["refused_total", "host_not_allowed"] == 6


def test_names_are_escaped_on_the_page_and_in_the_terminal():
    with Proxy(STATUS) as proxy, Session(proxy.native, SECRET, '<b onload="x">&') as session:
        throttle = session.throttle(SOURCE, Limits("<script>\u202e\u00e4", [(5, 60)]))
        assert throttle.wait_until_registered(30)
        now = view(proxy)
        assert [row["name"] for row in now["throttles"]] == ["<script>\u202e\u00e4"]
        page = get(proxy, "/")[2].decode()
        assert "<script>\u202e" not in page
        assert page.count("<script") == page.count("<script>\n(()=>{") == 1, "its own and no other"
        assert "<b onload" not in page
        assert "&lt;script&gt;\\u202e\u00e4" in page
        code, out, _ = command("--status", address(proxy))
        assert code == 0
        assert "\u202e" not in out
        assert "<script>\\u202e" in out
        assert metrics(proxy)["session_backlog", '<b onload="x">&'] == 0


# -- with the other listeners


def test_the_proxy_does_not_connect_to_its_own_status_listener():
    with Proxy(STATUS) as proxy, pytest.raises(Exception, match=r"2|not allowed"):  # SOCKS reply 2
        socks5(proxy.socks5, proxy.door("status"))
    assert proxy.matching(r"^WARNING refused .*reason=destination_not_allowed")


def test_a_reload_opens_moves_and_closes_it():
    with Proxy() as proxy:
        assert "status" not in [line.partition("protocol=")[2] for line in proxy.matching("listening on")]
        proxy.hup(STATUS)
        first = proxy.door("status")
        assert get(proxy, "/healthz")[0] == 200
        listed = "{}:{}".format(*first)
        with dial(first) as kept:

            def row():
                (it,) = [row for row in view(proxy)["listeners"] if row["address"] == listed]
                return it

            wait_for(lambda: row()["open_connections"] == 2, what="both who look are connected")
            proxy.hup("listen_status 127.0.0.2:0\n")
            wait_for(lambda: row()["closing"], what="the old listener, with one who still looks")
            assert view(proxy)["connections"]["open"] == 0, "those who look are no clients"
            kept.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert kept.recv(100).startswith(b"HTTP/1.1 200")
        with pytest.raises(ConnectionRefusedError):
            dial(first)
        second = proxy.door("status")
        proxy.hup("")
        with pytest.raises(ConnectionRefusedError):
            dial(second)
        assert proxy.bad_hup("listen_status {}:{}\n".format(*proxy.socks5))


def test_draining_is_503_until_the_end():
    with Raw(greet) as mx, Proxy(STATUS + "drain_timeout 30s\n") as proxy:
        with socks5(proxy.socks5, mx.endpoint) as client:
            assert client.recv(8)
            assert get(proxy, "/healthz")[0] == 200
            proxy.term()
            proxy.wait_line(r"^drain: ")
            status, _, body = get(proxy, "/healthz")
            assert (status, body) == (503, b"draining\n")
            assert view(proxy)["program"]["draining"] is True
            assert metrics(proxy)["draining",] == 1
            assert "draining</span>" in get(proxy, "/")[2].decode()
            code, out, _ = command("--status", address(proxy))
            assert code == 0
            assert "DRAINING" in out.splitlines()[0]
        assert proxy.wait_exit() == 0


def test_it_answers_when_descriptors_have_run_out():
    limits = "max_connections 100000\nauth_timeout 60s\n"
    with Proxy(STATUS + limits, before="ulimit -n 120", clean=False) as proxy, contextlib.ExitStack() as stack:
        for _ in range(150):
            stack.enter_context(dial(proxy.socks5))
        proxy.wait_line(r"^ERROR accept: ")
        for path in ("/healthz", "/", "/status.json", "/metrics") * 8:
            assert get(proxy, path)[0] == 200
        assert view(proxy)["counters"]["accept_errors"] > 0
        assert metrics(proxy)["process_open_fds",] > 90


# -- the command


def test_the_command_takes_the_address_from_the_configuration():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Proxy(f"listen_status 0.0.0.0:{port}\n") as proxy:
        code, out, err = command("--status", f"--config-filename={proxy.path}")
        assert (code, err) == (0, "")
        assert out.startswith("greenarrow_proxy ")
        assert f"0.0.0.0:{port}" in out
    code, out, err = command("--status", f"--config-filename={proxy.path}")
    assert (code, out) == (78, ""), "its file is gone"


WRONG = ["nonsense", "example.com:809", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:0", "[::1]", "::1"]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_address_is_a_usage_error(wrong):
    code, out, err = command(f"--status={wrong}")
    assert (code, out) == (64, "")
    told = "--status: not IP:PORT, [IPv6]:PORT, localhost:PORT or PORT"
    assert err == f"greenarrow_proxy: {told}\nSee greenarrow_proxy --help.\n"


def test_a_configuration_without_a_status_listener(tmp_path):
    file = tmp_path / "conf"
    for text, says in ((BASE, "not configured"), (BASE + STATUS, "port 0")):
        file.write_text(text)
        code, out, err = command("--status", f"--config-filename={file}")
        assert (code, out) == (78, "")
        assert err.startswith("listen_status: ")
        assert says in err
        assert err.count("\n") == 1


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code, out, err = command(f"--status=127.0.0.1:{port}")
    assert (code, out, err) == (69, "", f"greenarrow_proxy: 127.0.0.1:{port}: Connection refused\n")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"220 mx.example.com ESMTP\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 404 Not\x1b[31m Found\r\n\r\n", "answered 404 Not\\x1b[31m Found"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"a": 1}', "no status of this program"),
        (b"HTTP/1.1 200 OK\r\n\r\n\xff\xff", "no status of this program"),
        (b"", "closed without an answer"),
    ],
)
def test_somebody_else_there(answer, says):
    def other(sock):
        sock.recv(1000)
        sock.sendall(answer)
        sock.close()

    with Raw(other) as there:
        code, out, err = command("--status={}:{}".format(*there.endpoint))
    assert (code, out) == (69, "")
    assert says in err
    assert err.count("\n") == 1
    assert "\x1b" not in err


# -- trouble


def status_of(proxy):
    host, port = proxy.door("status")
    code, out, err = command("--status", f"{host}:{port}")
    assert (code, err) == (0, "")
    return out


def test_six_of_twelve_receivers_answer_421():
    """Told in words, on top of page and terminal, with the receivers' own words; mail to the others goes."""
    with contextlib.ExitStack() as stack:
        good = [stack.enter_context(Raw(greet, host=f"127.0.2.{number}")) for number in range(6)]
        script = {"greeting": say(b"421 4.7.0 try <later>\r\n", close)}
        bad = [stack.enter_context(Mx(script, host=f"127.0.3.{number}")) for number in range(6)]
        proxy = stack.enter_context(Proxy(STATUS))
        for _ in range(3):
            for receiver in (*good, *bad):
                with socks5(proxy.socks5, receiver.endpoint, SOURCE) as sock:
                    sock.recv(100)
        wait_for(lambda: [row["recent"] for row in view(proxy)["receivers"]] == [3] * 6, what="all have ended")
        shown = view(proxy)
        assert [row["kind"] for row in shown["trouble"]] == ["receivers_failing"]
        assert {row["name"] for row in shown["receivers"]} == {f"{mx.endpoint[0]}:{mx.endpoint[1]}" for mx in bad}
        assert {(row["last"], row["recent"]) for row in shown["receivers"]} == {("421 4.7.0 try <later>", 3)}
        page = get(proxy, "/")[2].decode()
        assert page.index("<h2>Trouble</h2>") < page.index("6 receivers refuse or fail") < page.index("Throttles")
        assert "421 4.7.0 try &lt;later&gt; (18 in the last 5 minutes" in page
        text = status_of(proxy)
        assert "\nTROUBLE: 6 receivers refuse or fail" in text
        assert shown["host"] in page
        assert shown["host"] in text


def test_a_source_that_is_missing_is_trouble():
    with Proxy(STATUS + "source_ip 127.0.0.0/8, 192.0.2.8\n") as proxy, Raw(greet) as receiver:
        with pytest.raises(Refused):
            socks5(proxy.socks5, receiver.endpoint, "192.0.2.8")
        (row,) = [row for row in view(proxy)["sources"] if row["name"] == "192.0.2.8"]
        assert (row["present"], row["failed"]) == (False, {"bind": 1})
        assert "source 192.0.2.8 is not on this machine" in status_of(proxy)
