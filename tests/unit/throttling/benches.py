"""A manager with a clock that a test moves, and sessions that answer pings at once."""

from __future__ import annotations

from proxy.throttling.flows import Places
from proxy.throttling.limits import Part
from proxy.throttling.manager import Manager
from proxy.throttling.session import GrantRecord, Output, Session
from proxy.throttling.throttle import SECOND, Key, Limit

MS = 1_000_000
SOURCE = "192.0.2.1"
KEY = Key(SOURCE, "yahoo")
OTHER = Key(SOURCE, "gmail")
ALL = Key(SOURCE, "all")


class Bench:
    """A manager long after its start, with a clock that a test moves, and sessions that answer pings at once."""

    def __init__(self, age: int = 50_000 * SECOND) -> None:
        self.now = 100_000 * SECOND
        self.manager = Manager(7, self.now - age)
        self.got: dict[Session, int] = {}
        self.caps: dict[Session, list[tuple[int, int]]] = {}
        self.quiet: set[Session] = set()

    def session(self, name: str, weight: float = 1.0, run: bytes = b"1") -> Session:
        session = self.manager.hello(name, run, f"{name}.example", weight, self.now)
        self.manager.ping(session, self.now // 1000, self.now)
        return session

    def register(self, session: Session, *parts: tuple[Key, Part], id: int = 0) -> None:
        self.manager.register(session, id, parts, self.now)

    def want(self, session: Session, want: int, got: int | None = None, id: int = 0, ram: int = 0) -> None:
        seen = self.got.get(session, 0) if got is None else got
        self.manager.demand(session, id, want, seen % 2**32, ram, 0, 0, self.now)

    def collect(self) -> dict[str, list[GrantRecord]]:
        """What the sessions are sent now; pings are answered."""
        grants: dict[str, list[GrantRecord]] = {}
        for session in self.manager.take_ready():
            output = self.manager.take(session, self.now)
            if output.ping is not None and session not in self.quiet:
                self.manager.pong(session, output.ping, 0, self.now)
            self.got[session] = self.got.get(session, 0) + sum(grant.n for grant in output.grants)
            self.caps.setdefault(session, []).extend(output.caps)
            if output.grants:
                grants.setdefault(session.name, []).extend(output.grants)
        return grants

    def run(self, span: int) -> dict[str, list[GrantRecord]]:
        """Let time pass, waking the manager when it asks for it."""
        end, total = self.now + span, self.collect()
        while (wake := self.manager.next_wakeup()) is not None and wake <= end:
            self.now = max(self.now, wake)
            self.manager.advance(self.now)
            for name, grants in self.collect().items():
                total.setdefault(name, []).extend(grants)
        self.now = end
        return total

    def mails(self, places: Places, messages: int) -> int:
        """The proxy sees that many MAILs; how many of them have to wait."""
        return sum(bool(self.manager.mail(places, self.now).late) for _ in range(messages))

    def output(self, session: Session) -> Output:
        return self.manager.take(session, self.now)


def part(*limits: Limit, **fields: object) -> Part:
    return Part(limits, **fields)  # type: ignore[arg-type]


def count(grants: dict[str, list[GrantRecord]]) -> dict[str, int]:
    return {name: sum(grant.n for grant in records) for name, records in grants.items()}
