"""etc/monitoring before real judges: promtool runs the rules' own tests, and a Prometheus that watches the real program
finds a series for all that an alert or a panel looks at."""

from __future__ import annotations

import contextlib
import json
import smtplib
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from greenarrow_proxy_client import Limits, Session
from tests import peers
from tests.clients import Refused, Smtp, socks5
from tests.engines import VALKEY_9, engine
from tests.monitoring import RULE_TESTS, RULES, alerts, queries, selectors
from tests.mx import Mx, say, usual
from tests.program import SECRET, Proxy
from tests.waiting import wait_for

pytestmark = pytest.mark.either_form("rules, dashboard and names of metrics")

SOURCE = "127.0.0.5"
#: A receiver there has to prove its name, and cannot.
PROVEN = "127.0.0.46"
CONFIG = f"""\
mode smtp
listen_tls no
listen_status 127.0.0.1:0
source vmta1 {{
    ip {SOURCE}
    ehlo client.example
}}
tls proven {{
    destination {PROVEN}
    level verify
}}
"""
SHARED = "throttle shared {\n    scope cluster\n    max_delivery_rate 1000/min\n}\n"
#: In each session one recipient is taken, one put off, one rejected.
REPLIES = {"rcpt": [usual, say(b"451 4.7.0 later\r\n"), say(b"550 5.1.1 nobody\r\n")]}


def promtool(*words: str | object) -> str:
    done = peers.run(peers.program("promtool"), *map(str, words))
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
    return done.stdout.decode()


def test_promtool_accepts_the_rules() -> None:
    assert f"{len(alerts())} rules found" in promtool("check", "rules", RULES)


def test_each_alert_fires_for_its_trouble_and_for_no_other() -> None:
    assert "SUCCESS" in promtool("test", "rules", RULE_TESTS)


def test_promtool_parses_each_query_of_the_dashboard() -> None:
    rules = [{"record": f"dashboard:{number}", "expr": query.expression} for number, query in enumerate(queries())]
    with peers.directory() as directory:
        file = directory / "dashboard.yml"  # JSON is YAML
        file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
        assert f"{len(rules)} rules found" in promtool("check", "rules", file)


@contextlib.contextmanager
def prometheus(proxy: Proxy) -> Iterator[str]:
    """One that watches the proxy as docs/operations.md says; its address."""
    host = peers.address()
    at = f"{host}:{peers.free_port(host)}"
    target = "{}:{}".format(*proxy.door("status"))
    scrape = {"job_name": "greenarrow_proxy", "static_configs": [{"targets": [target]}]}
    config = {
        "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"},
        "rule_files": [str(RULES)],
        "scrape_configs": [scrape],
    }
    with peers.directory() as directory:
        (directory / "prometheus.yml").write_text(json.dumps(config))
        flags = (f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data")
        address, _, port = at.partition(":")
        command = (peers.program("prometheus"), *flags, f"--web.listen-address={at}")
        with peers.Daemon(*command, listens=(address, int(port)), cwd=directory):
            yield f"http://{at}/api/v1/"


def ask(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)["data"]


def series(api: str, expression: str) -> list[dict[str, str]]:
    """The labels of each series that the expression finds now."""
    found = ask(f"{api}query?{urllib.parse.urlencode({'query': expression})}")["result"]
    return [each["metric"] for each in found]


def traffic(proxy: Proxy, mx: Mx) -> None:
    """One message to three recipients, as far as it comes."""
    to = [f"{number}@example.net" for number in range(3)]
    with (
        contextlib.suppress(Refused, OSError, smtplib.SMTPException),
        socks5(proxy.socks5, mx.endpoint, SOURCE) as sock,
    ):
        Smtp(sock).sendmail("me@example.com", to, b"Subject: x\r\n\r\nx\r\n")


def test_a_prometheus_finds_all_that_alerts_and_panels_look_at() -> None:
    wanted = {expression for alert in alerts() for expression in selectors(alert.expression)}
    with (
        engine(VALKEY_9) as store,
        Proxy(f"{CONFIG}throttle_store {store.url()}\nthrottle_store_members 2\n{SHARED}") as proxy,
        Mx(REPLIES, starttls=True) as mx,
        Mx({"tls": say(b"no TLS at all\r\n")}, starttls=True) as broken,
        Mx(host=PROVEN, starttls=True, certificate="wrong_name") as unproven,
        Session(proxy.native, SECRET, "server-a", tls=False) as session,
        prometheus(proxy) as api,
    ):
        throttle = session.throttle(SOURCE, Limits("yahoo", [(1, 3600)]))
        throttle.backlog(ram=3)
        panels = queries("20s")

        def missing() -> list[object]:
            for receiver in (mx, broken, unproven):
                traffic(proxy, receiver)
            with contextlib.suppress(Refused):
                socks5(proxy.socks5, mx.endpoint, password="x" * 32).close()
            return [
                *(expression for expression in wanted if not series(api, expression)),
                *(
                    query
                    for query in panels
                    if not (found := series(api, query.expression)) or any(set(query.legend) - set(it) for it in found)
                ),
            ]

        left: list[object] = []

        def complete() -> bool:
            left[:] = missing()
            return not left

        try:
            wait_for(complete, 40, "every alert and every panel has something to look at")
        except AssertionError:
            raise AssertionError(left) from None
        (group,) = ask(f"{api}rules")["groups"]
        assert {rule["health"] for rule in group["rules"]} == {"ok"}, group
