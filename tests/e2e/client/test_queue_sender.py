"""The example MTA of etc/clients, in a process of its own, through the real program to a receiver that errs.

What it promises: every message arrives, none arrives twice for a reason that could be known, and what the receiver
refuses for good lies in failed/.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mail_queue import MailQueue

from tests.mx import Mx, Session, close, say, usual
from tests.program import SECRET, Proxy
from tests.waiting import wait_for

ROOT = Path(__file__).parents[3]
PROGRAM = ROOT / "etc" / "clients" / "queue_sender.py"
SOURCE = "127.0.0.14"


def content(number: int) -> bytes:
    return (
        b"Subject: %d\r\n\r\n.leading dot %d\r\n.\r\n\xe4 8 bits\r\n" % (number, number)
        + b"x" * (number * 50)
        + b"\r\n"
    )


class Mta:
    """The example's process, its queue and its log; a context manager that ends it."""

    def __init__(
        self, directory: Path, proxy: tuple[str, int], routes: list[dict[str, Any]], *others: tuple[str, int]
    ) -> None:
        self.queue = MailQueue(directory / "queue")
        self.log: list[dict[str, Any]] = []
        self.file = directory / "queue_sender.toml"
        (directory / "secret").write_text(SECRET + "\n")
        head = {
            "proxy": [f"{host}:{port}" for host, port in (proxy, *others)] if others else f"{proxy[0]}:{proxy[1]}",
            "secret_file": str(directory / "secret"),
            "instance": "server-q",
            "queue": str(directory / "queue"),
            "retry": [0.2, 0.5],
            "give_up": 3600,
        }
        usual = {"ehlo_name": "mail14.example", "source_ip": SOURCE, "tls": "none"}
        lines = [f"{name} = {json.dumps(value)}" for name, value in head.items()]
        for route in routes:
            lines.append("[[route]]")
            lines += [f"{name} = {json.dumps(value)}" for name, value in (usual | route).items()]
        self.file.write_text("\n".join(lines))

    def start(self, *flags: str, interpreter: tuple[str, ...] = (sys.executable,)) -> None:
        self.process = subprocess.Popen(
            [*interpreter, str(PROGRAM), *flags, str(self.file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{PROGRAM.parent}"},
        )
        self._reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                # A line that kill -9 has cut is none.
                self.log.append(json.loads(line) if line.endswith(b"}\n") else {"event": line.decode()})

    def end(self, number: int | None = None, timeout: float = 60.0) -> int:
        """Wait for its end, which a signal may bring about; the exit code."""
        if number is not None:
            self.process.send_signal(number)
        code = self.process.wait(timeout)
        self._reader.join(30)
        return code

    def events(self, name: str) -> list[dict[str, Any]]:
        return [entry for entry in list(self.log) if entry["event"] == name]

    def waiting(self) -> int:
        return len(list(self.queue.ids()))

    def __enter__(self) -> Mta:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.end(signal.SIGKILL)


class Moody:
    """What the receiver does depends on the recipient's name, and on whether it is the first time.

    Attributes:
        copies: recipient → what was accepted for it: the session, and how many commands had come in it by then.
    """

    def __init__(self) -> None:
        self.copies: dict[str, list[tuple[Session, int]]] = {}
        self._seen: Counter[bytes] = Counter()
        self._welcome: dict[int, list[bytes]] = {}

    def script(self, _: int) -> dict[str, Any]:
        return {"mail": self._mail, "rcpt": self._rcpt, "data": self._data, "dot": self._dot}

    def _first(self, commands: list[bytes], word: bytes) -> bool:
        about = next((command for command in commands if word in command), None)
        if about is not None:
            self._seen[about] += 1
        return about is not None and self._seen[about] == 1

    def _mail(self, session: Session, reply: bytes) -> None:
        self._welcome[session.number] = []
        usual(session, reply)

    def _rcpt(self, session: Session, reply: bytes) -> None:
        command = session.commands[-1]
        if b"never" in command:
            say(b"550 5.1.1 no such user\r\n")(session, reply)
        elif self._first([command], b"later"):
            say(b"450 4.2.0 greylisted\r\n")(session, reply)
        elif self._first([command], b"gone"):
            say(b"421 4.3.2 going down\r\n", close)(session, reply)
        else:
            self._welcome[session.number].append(command)
            usual(session, reply)

    def _data(self, session: Session, reply: bytes) -> None:
        (close if self._first(self._welcome[session.number], b"early") else usual)(session, reply)

    def _dot(self, session: Session, reply: bytes) -> None:
        welcome = self._welcome[session.number]
        if any(b"spam" in command for command in welcome):
            say(b"554 5.7.1 rejected\r\n")(session, reply)
        elif self._first(welcome, b"full"):
            say(b"452 4.3.1 disk full\r\n")(session, reply)
        elif self._first(welcome, b"cut"):  # it may have taken it: who knows
            close(session, reply)
        else:
            for command in welcome:
                name = command.decode().partition("<")[2].partition("@")[0]
                self.copies.setdefault(name, []).append((session, len(session.commands)))
            usual(session, reply)


KINDS = ("fine", "later", "never", "fine", "gone", "early", "spam", "full", "cut", "fine")
REFUSED = {"never": "550 5.1.1 no such user", "spam": "554 5.7.1 rejected"}


def kind_of(number: int) -> str:
    return KINDS[number % len(KINDS)]


def test_two_hundred_messages_and_everything_goes_wrong(tmp_path: Path) -> None:
    """4xx and 5xx at each step, dropped connections, proxy and sender killed and started again."""
    count, moody = 200, Moody()
    with Mx(moody.script) as mx:
        route = {"name": "r", "domains": ["r.example"], "mx": [f"{mx.host}:{mx.port}"], "workers": 6}
        route |= {"rates": [[60, 1]], "max_connections": 4, "messages_per_connection": 8}
        with Proxy(exit_code=-signal.SIGKILL) as proxy:
            at = proxy.native
            mta = Mta(tmp_path, at, [route])
            for number in range(count):
                kind = kind_of(number)
                more = [f"also{number}@r.example"] if kind in ("never", "later") else []
                mta.queue.put(f"{number}@s.example", [f"{kind}{number}@r.example", *more], content(number))
            mta.start()
            wait_for(lambda: len(mx.messages) >= 50, what="50 messages")
            proxy.signal(signal.SIGKILL)
        with mta, Proxy(f"listen {at[0]}:{at[1]}\n"):
            mark = len(mx.messages)
            wait_for(lambda: len(mx.messages) >= mark + 40, 30, what="40 more")
            assert mta.end(signal.SIGKILL) == -signal.SIGKILL
            assert mta.waiting() > 20, "killed in the middle"
            mta.start("--drain")
            assert mta.end() == 0, mta.log[-3:]
        check_everything(moody, mx, mta, count)


def check_everything(moody: Moody, mx: Mx, mta: Mta, count: int) -> None:
    numbers = range(count)
    fine = {f"{kind_of(number)}{number}" for number in numbers if kind_of(number) not in REFUSED}
    assert set(moody.copies) == fine | {f"also{number}" for number in numbers if kind_of(number) in ("never", "later")}
    again = {name: copies for name, copies in moody.copies.items() if len(copies) > 1}
    for name, copies in again.items():
        # The session broke off right there, each time but the last: its sender could not know.
        assert all(len(session.commands) == commands for session, commands in copies[:-1]), name
    assert len(again) <= 8, "one for each connection that was open when one of the two was killed, at most"
    for message in mx.messages:
        assert message.content == content(int(message.mail.partition(b"<")[2].partition(b"@")[0]))
        assert message.peer[0] == SOURCE
    assert not mta.waiting()
    failed = [json.loads(file.read_text()) for file in mta.queue.failed.glob("*.json")]
    refused = {rcpt: reply for each in failed for rcpt, reply in each["refused"].items()}
    assert refused == {
        f"{kind_of(number)}{number}@r.example": REFUSED[kind_of(number)]
        for number in numbers
        if kind_of(number) in REFUSED
    }
    for each in failed:
        assert (mta.queue.failed / f"{each['id']}.eml").read_bytes() == content(int(each["sender"].partition("@")[0]))


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with Proxy("source_ip 127.0.0.14\n") as proxy:
        yield proxy


def test_a_stop_in_good_order_sends_nothing_twice(tmp_path: Path, proxy: Proxy) -> None:
    with Mx() as mx, Mta(tmp_path, proxy.native, [simple(mx) | {"rates": [[50, 1]]}]) as mta:
        for number in range(60):
            mta.queue.put(f"{number}@s.example", [f"fine{number}@r.example"], content(number))
        mta.start()
        wait_for(lambda: len(mx.messages) >= 10)
        assert mta.end(signal.SIGTERM) == 0
        left = mta.waiting()
        assert 0 < left == 60 - len(mx.messages)
        proxy.wait_line(r"session is over instance=server-q .*reason=bye")
        mta.start("--drain")
        assert mta.end() == 0
        assert Counter(message.rcpts for message in mx.messages) == Counter(
            (b"rcpt TO:<fine%d@r.example>" % number,) for number in range(60)
        )


def simple(mx: Mx) -> dict[str, Any]:
    return {"name": "simple", "domains": ["*"], "mx": [f"{mx.host}:{mx.port}"]}


def test_what_the_proxy_refuses_waits_with_the_reason(tmp_path: Path, proxy: Proxy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = "{}:{}".format(*closed.getsockname())
    with Mx({"greeting": say(b"554 5.7.1 not you\r\n")}) as rude, Mx() as mx:
        routes = [
            simple(mx) | {"name": "source", "domains": ["source.example"], "source_ip": "127.0.0.66"},
            simple(mx) | {"name": "nobody", "domains": ["nobody.example"], "mx": [nobody]},
            simple(rude) | {"name": "rude", "domains": ["rude.example"]},
            simple(mx) | {"name": "fine", "domains": ["fine.example"]},
        ]
        with Mta(tmp_path, proxy.native, routes) as mta:
            names = ("source", "nobody", "rude", "lost", "fine")
            ids = mta.queue.put("a@s.example", [f"b@{name}.example" for name in names], content(1))
            mta.start()
            wait_for(lambda: len(mx.messages) == 1 and mta.waiting() == 4)
            wait_for(lambda: {each["id"] for each in mta.events("deferred")} == set(ids[:4]))
            assert mta.end(signal.SIGTERM) == 0
            reasons = [mta.queue.load(id).reason for id in ids[:4]]
            assert reasons[0] == "throttle_rejected: source 127.0.0.66 is not in source_ip"
            assert reasons[1].startswith("connect: ")
            assert reasons[2].startswith("greeting: ")
            assert "554 5.7.1 not you" in reasons[2]
            assert reasons[3] == "no route to lost.example"
            assert [mta.queue.load(id).attempts for id in ids[:4]] == [0] * 4


def test_without_a_proxy_it_waits(tmp_path: Path) -> None:
    with Proxy() as first:
        at = first.native
    with Mx() as mx, Mta(tmp_path, at, [simple(mx)]) as mta:
        mta.queue.put("", ["b@r.example"], content(1))
        mta.start("--drain")
        with Proxy(f"listen {at[0]}:{at[1]}\n"):
            assert mta.end() == 0
        (message,) = mx.messages
        assert message.mail.startswith(b"mail FROM:<>")
        assert message.content == content(1)


def test_with_two_proxies_it_waits_for_none_of_them(tmp_path: Path) -> None:
    """The preferred one is killed in the middle: the rest goes through the other, and nothing is put off."""
    with Proxy() as second, Proxy(exit_code=-signal.SIGKILL) as first, Mx() as mx:
        route = simple(mx) | {"rates": [[20, 1]]}
        with Mta(tmp_path, first.native, [route], second.native) as mta:
            for number in range(20):
                mta.queue.put("a@s.example", ["b@r.example"], content(number))
            mta.start("--drain")
            wait_for(lambda: len(mta.events("delivered")) >= 5, 60)
            wait_for(lambda: any("session(server-q)" in line for line in second.status()))
            first.signal(signal.SIGKILL)
            assert mta.end() == 0
            assert {message.content for message in mx.messages} == {content(number) for number in range(20)}
            assert mta.events("proxy_away") == []
        second.wait_line(r"^connection .*instance=server-q")


def test_a_wrong_secret_is_for_somebody_to_mend(tmp_path: Path, proxy: Proxy) -> None:
    with Mx() as mx, Mta(tmp_path, proxy.native, [simple(mx)]) as mta:
        (tmp_path / "secret").write_text("x" * 32)
        mta.queue.put("a@s.example", ["b@r.example"], content(1))
        mta.start("--drain")
        assert mta.end() == 1
        assert "ProxyRejected" in mta.log[-1]["reason"]
        assert mta.waiting() == 1


def test_a_connection_is_given_back_until_the_next_permit(tmp_path: Path, proxy: Proxy) -> None:
    """A message a second, and nobody keeps a connection for that long without using it."""
    route = {"rates": [[60, 60]], "hold": 0.1, "workers": 1}
    with Mx() as mx, Mta(tmp_path, proxy.native, [simple(mx) | route]) as mta:
        for number in range(4):
            mta.queue.put(f"{number}@s.example", [f"fine{number}@r.example"], content(number))
        mta.start("--drain")
        assert mta.end() == 0
        assert (len(mx.messages), mx.connects) == (4, 1)
        ours = rf"^connection .* destination={re.escape(mx.host)}:{mx.port} reused=(?:yes|no) .* outcome=kept"
        wait_for(lambda: len(proxy.matching(ours)) >= 4, what="one SMTP session a message")


def test_threads_may_be_greenlets(tmp_path: Path, proxy: Proxy) -> None:
    """The same program, monkey-patched by gevent before it starts."""
    with Mx() as mx, Mta(tmp_path, proxy.native, [simple(mx) | {"rates": [[100, 1]], "max_connections": 3}]) as mta:
        for number in range(20):
            mta.queue.put(f"{number}@s.example", [f"fine{number}@r.example"], content(number))
        mta.start("--drain", interpreter=(sys.executable, "-m", "gevent.monkey"))
        assert mta.end() == 0
        assert len({message.rcpts for message in mx.messages}) == len(mx.messages) == 20


def test_the_oldest_mail_is_given_up(tmp_path: Path, proxy: Proxy) -> None:
    with Mx({"mail": [say(b"451 4.3.0 not now\r\n")] * 1000}) as mx, Mta(tmp_path, proxy.native, [simple(mx)]) as mta:
        (id,) = mta.queue.put("a@s.example", ["b@r.example"], content(1))
        mta.start("--drain")
        wait_for(lambda: mta.events("deferred"))
        envelope = mta.queue.load(id)
        mta.end(signal.SIGTERM)
        envelope.created -= 7200
        envelope.reason = "451 4.3.0 not now"
        mta.queue.save(envelope)
        mta.start("--drain")
        assert mta.end() == 0
        failed = json.loads((mta.queue.failed / f"{id}.json").read_text())
        assert failed["refused"] == {"b@r.example": "500 given up; 451 4.3.0 not now"}


def test_the_sample_configuration_and_a_message_by_hand(tmp_path: Path) -> None:
    """As the README says it: only addresses, paths and the secret are other ones."""
    with Mx() as mx, Proxy() as proxy, Mta(tmp_path, proxy.native, []) as mta:
        text = PROGRAM.with_suffix(".toml").read_text()
        for old, new in (
            ("10.0.0.1:807", "{}:{}".format(*proxy.native)),
            ("/etc/queue_sender.secret", f"{tmp_path}/secret"),
            ("/var/spool/queue_sender", f"{tmp_path}/queue"),
            ("198.51.100.7:25", f"{mx.host}:{mx.port}"),
            ("192.0.2.1", SOURCE),
        ):
            assert old in text
            text = text.replace(old, new)
        mta.file.write_text(text)
        command = [sys.executable, PROGRAM.with_name("mail_queue.py"), tmp_path / "queue", "me@s.example"]
        recipients = ["you@yahoo.com", "you@ymail.com", "me@yahoo.com"]
        subprocess.run([*command, *recipients], input=b"Subject: x\n\nHello\n", check=True, stdout=subprocess.PIPE)
        assert mta.waiting() == 2, "one for each domain"
        mta.start("--drain")
        assert mta.end() == 0
        assert [message.content for message in mx.messages] == [b"Subject: x\r\n\r\nHello\r\n"] * 2
        assert sorted(len(message.rcpts) for message in mx.messages) == [1, 2]


def test_a_damaged_queue_file_stops_nobody(tmp_path: Path, proxy: Proxy) -> None:
    with Mx() as mx, Mta(tmp_path, proxy.native, [simple(mx)]) as mta:
        ids = [mta.queue.put("a@s.example", [f"{n}@r.example"], content(1))[0] for n in range(3)]
        (mta.queue.ready / f"{ids[0]}.json").write_bytes(b"{}")
        (mta.queue.ready / f"{ids[1]}.eml").unlink()
        mta.start("--drain")
        assert mta.end() == 0
        assert [message.rcpts for message in mx.messages] == [(b"rcpt TO:<2@r.example>",)]
        assert {each["id"] for each in mta.events("damaged")} == set(ids[:2])
        assert mta.waiting() == 2


def test_two_senders_do_not_share_a_queue(tmp_path: Path, proxy: Proxy) -> None:
    with Mx() as mx, Mta(tmp_path, proxy.native, [simple(mx)]) as mta:
        mta.queue.lock()
        mta.start()
        assert mta.end() == 1
        assert any("BlockingIOError" in entry["event"] for entry in mta.log)
