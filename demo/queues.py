"""The part of the demonstration that needs the native protocol: three MTAs share one limit and two connections.

They are processes of their own, the example of etc/clients as it is: each drains its own queue. What is said about
them comes from three sides and must agree: their logs, the receiver, and what was put into the queues.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mail_queue import MailQueue

from demo.program import PATIENCE, ROOT, SECRET, Proxy, say
from demo.receiver import MX_ADDRESS, Arrival, Mailbox
from demo.ways import message

NAMES = ("server-d", "server-e", "server-f")
SOURCE = "127.0.0.14"
A_MINUTE = 600
CONNECTIONS = 2
MESSAGES = 8  # of each
SIZE = 20_000
#: Seconds that a permit may be used late, for this limit.
SLACK = 0.5

CONFIGURATION = """\
proxy = "{proxy}"
secret_file = "{directory}/secret"
instance = "{name}"
queue = "{directory}/{name}"
retry = [1]
give_up = 60

[[route]]
name = "receiver.example"
domains = ["receiver.example"]
mx = ["{mx}"]
source_ip = "{source}"
ehlo_name = "mail14.example"
tls = "required"
rates = [[{a_minute}, 60]]
max_connections = {connections}
workers = {connections}
messages_per_connection = 3
"""


@dataclass
class Mta:
    """One instance: what was put into its queue, by Message-ID, and what its log says."""

    name: str
    directory: Path
    content: dict[str, bytes] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    noise: list[str] = field(default_factory=list)

    def fill(self) -> None:
        self.queue = MailQueue(self.directory / self.name)
        for number in range(MESSAGES):
            name = f"queued{number}@{self.name}.example"
            self.content[name] = message(name, self.name, SIZE)
            (id,) = self.queue.put(f"sender@{self.name}.example", ["user@receiver.example"], self.content[name])
            self.ids[id] = name

    def start(self, proxy: Proxy, mx_port: int) -> None:
        file = self.directory / f"{self.name}.toml"
        host, port = proxy.address("native")
        text = CONFIGURATION.format(
            proxy=f"{host}:{port}",
            directory=self.directory,
            name=self.name,
            mx=f"{MX_ADDRESS}:{mx_port}",
            source=SOURCE,
            a_minute=A_MINUTE,
            connections=CONNECTIONS,
        )
        file.write_text(text)
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "etc" / "clients" / "queue_sender.py"), "--drain", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                try:
                    self.log.append(json.loads(line))
                except ValueError:
                    self.noise.append(line.rstrip())

    def end(self) -> str:
        """Wait for its end; what is wrong, or ""."""
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join(PATIENCE)
        if code == 0 and not self.noise and not self.events("deferred"):
            return ""
        said = "; ".join(self.noise[-3:] or [str(entry) for entry in self.log[-3:]])
        return (
            f"{self.name}: {'exit code ' + str(code) if code is not None else 'was not done in time'}; it said: {said}"
        )

    def events(self, name: str) -> list[dict[str, Any]]:
        return [entry for entry in list(self.log) if entry["event"] == name]

    @property
    def attempts(self) -> dict[str, dict[str, Any]]:
        """By Message-ID."""
        return {self.ids[entry["id"]]: entry for entry in self.events("attempt")}


def check_queues(proxy: Proxy, mailbox: Mailbox, mx_port: int, directory: Path) -> list[str]:
    """Let them drain their queues, and compare; returns what is wrong."""
    (directory / "secret").write_text(SECRET)
    mtas = [Mta(name, directory) for name in NAMES]
    for mta in mtas:
        mta.fill()
    began = time.monotonic()
    for mta in mtas:
        mta.start(proxy, mx_port)
    _watch(mtas, began)
    wrong = [problem for mta in mtas if (problem := mta.end())]
    arrived = {name: mailbox.arrived.pop(name) for name in list(mailbox.arrived) if name.startswith("queued")}
    wrong += _messages(mtas, arrived) + _connections(arrived, mailbox) + _limit(mtas)
    if any(file.name.endswith(".json") for mta in mtas for file in mta.queue.failed.iterdir()):
        wrong.append("a message was taken for undeliverable")
    return wrong


def _watch(mtas: list[Mta], began: float) -> None:
    """Say how far they are, about once a second, until all have ended or time is up."""
    told = 0
    while any(mta.process.poll() is None for mta in mtas):
        if time.monotonic() - began > PATIENCE:
            return
        time.sleep(0.05)
        if time.monotonic() - began > told + 1:
            told = int(time.monotonic() - began)
            done = ", ".join(f"{mta.name} {len(mta.events('delivered'))}/{MESSAGES}" for mta in mtas)
            say(f"  after {told} s: {done}")


def _messages(mtas: list[Mta], arrived: dict[str, Arrival]) -> list[str]:
    """A line a message, in the order of their arrival."""
    wrong = []
    ports = list(dict.fromkeys(arrival.port for arrival in arrived.values()))
    content = {name: data for mta in mtas for name, data in mta.content.items()}
    attempts = {name: entry for mta in mtas for name, entry in mta.attempts.items()}
    say(f"  {'message':<30} {'left from':<11} {'connection':<11} {'time':>9}  content")
    for name, arrival in arrived.items():
        attempt = attempts.get(name, {"seconds": 0.0, "port": 0})
        same = arrival.content == content.get(name)
        verdict = f"{len(arrival.content):,} bytes, {'identical' if same else 'CHANGED'}"
        number = chr(ord("A") + ports.index(arrival.port))
        say(f"  {name:<30} {arrival.client:<11} {number:<11} {attempt['seconds'] * 1000:>6.1f} ms  {verdict}")
        if not same:
            wrong.append(f"{name} was changed on the way")
        if (arrival.client, arrival.tls, arrival.port) != (SOURCE, True, attempt["port"]):
            wrong.append(f"{name} did not leave from {SOURCE}, with TLS, on the connection that its sender names")
    wrong += [f"{name} did not arrive" for name in content if name not in arrived]
    return wrong


def _connections(arrived: dict[str, Arrival], mailbox: Mailbox) -> list[str]:
    """Who used which connection, and whether there were too many."""
    users: dict[int, list[str]] = {}
    for name, arrival in arrived.items():
        owner = name.partition("@")[2].removesuffix(".example")
        users.setdefault(arrival.port, []).append(owner)
    for number, owners in enumerate(users.values()):
        turns = [owner for at, owner in enumerate(owners) if at == 0 or owners[at - 1] != owner]
        say(f"  connection {chr(ord('A') + number)}: one TLS handshake, {len(owners)} messages: {' -> '.join(turns)}")
    most = mailbox.most_connections.get(SOURCE, 0)
    say(f"  at most {CONNECTIONS} connections for all together: {most} at a time, by the MX's own count")
    wrong = [] if most <= CONNECTIONS else [f"{most} connections at a time instead of {CONNECTIONS}"]
    if not any(len(set(owners)) > 1 for owners in users.values()):
        wrong.append("no connection was shared")
    return wrong


def _limit(mtas: list[Mta]) -> list[str]:
    """Any run of messages, however it is cut out, must be spread as the limit says."""
    sent = sorted(entry["at"] for mta in mtas for entry in mta.events("attempt"))
    spent = sent[-1] - sent[0] if sent else 0.0
    shares = ", ".join(f"{len(mta.events('attempt'))} by {mta.name}" for mta in mtas)
    say(f"  at most {A_MINUTE} a minute for all together: {len(sent)} messages in {spent:.1f} s: {shares}")
    interval = 60 / A_MINUTE
    for first in range(len(sent)):
        for last in range(first, len(sent)):
            if sent[last] - sent[first] < (last - first) * interval - SLACK:
                count = last - first + 1
                return [f"{count} messages in {sent[last] - sent[first]:.2f} s are more than {A_MINUTE} a minute"]
    return []
