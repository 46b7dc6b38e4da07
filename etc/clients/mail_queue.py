"""A mail queue in a directory: one message, two files, and every change a rename, so that no crash loses a message.

    ready/ID.json    the envelope. The message is in the queue exactly as long as this file exists.
    ready/ID.eml     its bytes as they go over the wire (RFC 5322, lines end in CRLF); never changed.
    failed/ID.*      the same of messages with recipients that were refused, and what the receivers said
    tmp/             files that are being written

The order of the steps is what makes it safe: what a name refers to is on the disk before the name is. A crash between
two steps leaves a file too many (removed by `clean` later), never an envelope without its message.

What cannot be promised is said in `queue_sender`. This module speaks no SMTP. To queue a message:

    python3 mail_queue.py /var/spool/queue_sender FROM TO... < message
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

_ORPHAN_AGE = 3600.0
_logging = threading.Lock()
#: What was said to each recipient: code and text.
Replies = dict[str, tuple[int, bytes]]


@dataclass
class Envelope:
    """What is known about a message besides its bytes.

    Attributes:
        recipients: those that are still to be served; all of one domain.
        created, due: seconds since 1970: when it was queued, when the next attempt is due.
        attempts: how many there were.
        reason: why the last one did not do.
        refused: recipient → what was said, of those that will never be served.
    """

    id: str
    sender: str
    recipients: list[str]
    created: float
    due: float
    attempts: int = 0
    reason: str = ""
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def domain(self) -> str:
        return domain_of(self.recipients[0])


class MailQueue:
    """Args:
    path: the directory; made if it is not there. Any number of programs may `put`, one at a time may send (`lock`).
    """

    def __init__(self, path: str | Path) -> None:
        self.ready, self.failed, self._tmp = (Path(path) / name for name in ("ready", "failed", "tmp"))
        for directory in (self.ready, self.failed, self._tmp):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def lock(self) -> None:
        """Be the one that sends, until this process ends. The kernel lets go of the lock after kill -9, too.

        Raises:
            BlockingIOError: another process is.
        """
        descriptor = os.open(self.ready.parent / "lock", os.O_RDWR | os.O_CREAT, 0o600)  # stays open
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def put(self, sender: str, recipients: Sequence[str], content: bytes) -> list[str]:
        """Queue a message, once for each domain among its recipients. On return the disk has it; a crash before may
        leave it queued for some of the domains.

        Raises:
            ValueError: not to be sent as it is: an address with odd characters, or line ends other than CRLF (receivers
                that take a bare LF for a line end see another message than we do: "SMTP smuggling").
        """
        for address in filter(None, [sender, *recipients]):
            if not re.fullmatch(r"[!-;=?-~]+@[!-;=?-~]+", address):
                raise ValueError(f"not an address: {address!r}")
        if re.search(rb"\r(?!\n)|(?<!\r)\n", content):
            raise ValueError("lines must end in CRLF")
        domains: dict[str, list[str]] = {}
        for address in dict.fromkeys(recipients):
            domains.setdefault(domain_of(address), []).append(address)
        now = time.time()
        envelopes = [Envelope(_new_id(), sender, group, now, now) for group in domains.values()]
        for envelope in envelopes:
            self._write(self.ready / f"{envelope.id}.eml", content)
            self.save(envelope)
        return [envelope.id for envelope in envelopes]

    def ids(self) -> Iterator[str]:
        """The messages in the queue, the oldest first."""
        yield from sorted(name[:-5] for name in os.listdir(self.ready) if name.endswith(".json"))

    def load(self, id: str) -> Envelope:
        """Raises:
        FileNotFoundError: it is not in the queue any more. ValueError, TypeError: somebody else has been here.
        """
        envelope = Envelope(**json.loads((self.ready / f"{id}.json").read_bytes()))
        if envelope.id != id or not (self.ready / f"{id}.eml").exists():
            raise ValueError("the envelope is not that of a message here")
        return envelope

    def content(self, envelope: Envelope) -> bytes:
        return (self.ready / f"{envelope.id}.eml").read_bytes()

    def save(self, envelope: Envelope) -> None:
        """Put the envelope in the place of its former self: a reader sees the old one or the new one, whole."""
        self._write(self.ready / f"{envelope.id}.json", json.dumps(asdict(envelope)).encode())

    def finish(self, envelope: Envelope) -> None:
        """No recipient is left: take the message out of the queue, to `failed` if some were refused. Also after a
        crash in the middle of it."""
        content = self.ready / f"{envelope.id}.eml"
        if envelope.refused:
            self.save(envelope)  # those that were served are not served again, whatever happens from here on
            with contextlib.suppress(FileExistsError):
                os.link(content, self.failed / content.name)
            self._write(self.failed / f"{envelope.id}.json", json.dumps(asdict(envelope)).encode())
        (self.ready / f"{envelope.id}.json").unlink()
        _to_disk(self.ready)
        content.unlink()

    def clean(self) -> None:
        """Remove what crashes have left; not what another program may be about to put."""
        for path in [*self._tmp.iterdir(), *self.ready.glob("*.eml")]:
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _ORPHAN_AGE and not path.with_suffix(".json").exists():
                    path.unlink()

    def _write(self, path: Path, data: bytes) -> None:
        temporary = self._tmp / f"{uuid.uuid4().hex}.new"
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        _to_disk(path.parent)


def _new_id() -> str:
    """Sorts by time."""
    return f"{time.time_ns():016x}{uuid.uuid4().hex[:8]}"


def domain_of(address: str) -> str:
    return address.rpartition("@")[2].lower()


def says(code: int, text: bytes) -> str:
    return f"{code} {text.decode('utf-8', 'replace')}"


def log(event: str, **fields: object) -> None:
    """One JSON object, one line, in one piece."""
    line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}) + "\n"
    with _logging:
        sys.stdout.write(line)
        sys.stdout.flush()


def _to_disk(directory: Path) -> None:
    """A rename is safe against a power failure only after this."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    spool, mail_from, *rcpts = sys.argv[1:]
    message = re.sub(rb"\r\n|\r|\n", b"\r\n", sys.stdin.buffer.read())
    print(*MailQueue(spool).put(mail_from, rcpts, message), sep="\n")
