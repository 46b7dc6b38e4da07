"""Asks DNS what the domains of blocks mean, off the hub: dnspython waits in sockets, so it has real threads.

What to ask, when, and what answers mean is decided in `policy.directory`. Until there is an answer, a block by domain
holds for what clients themselves say of their receivers; nobody waits for one, but for the first of each domain in
`tls` blocks. A server that hangs occupies these threads and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any

import gevent
from gevent.event import Event
from gevent.pool import Pool

from proxy.log import lines as log
from proxy.model import Breathe, Endpoint, canonical_ip, hold_breath
from proxy.net.apart import Apart
from proxy.policy.directory import Answer, Book, Question, Reply, look_up

#: Domains that are looked up at a time.
AT_ONCE = 4
#: Seconds for one question with its repetitions; a domain may have so many of these times.
PATIENCE = 5.0
_TIMES = 12


class LookUps:
    """Keeps a `Book` true.

    Args:
        changed: called in a greenlet when the book says something else than before.
        patience: seconds for one question.
    """

    def __init__(
        self,
        book: Book,
        changed: Callable[[], None],
        clock: Callable[[], float] = monotonic,
        patience: float = PATIENCE,
    ) -> None:
        self._book, self._changed, self._clock, self._patience = book, changed, clock, patience
        self._apart = Apart(AT_ONCE)
        self._pool = Pool(AT_ONCE)
        self._wake = Event()
        self._heard = Event()  # pulsed by each answer
        self._server: Endpoint | None = None
        self._running: gevent.Greenlet[Any] | None = None

    def use(self, domains: Iterable[str], server: Endpoint | None, breathe: Breathe = hold_breath) -> None:
        """Look these up from now on; a server of None is the system's."""
        now = self._clock()
        if server != self._server:
            self._server = server
            self._book.renew(now)
        if self._book.want(domains, now, breathe):
            self._changed()
        if self._running is None and self._book.entries:
            self._running = gevent.spawn(self._run)
        self._wake.set()

    def stop(self) -> None:
        """Ask no more; a thread that waits for an answer ends by itself."""
        if self._running is not None:
            self._running.kill(block=False)  # first, or it would fill the pool again
        self._pool.kill(block=False)

    def wake(self) -> None:
        """Look at the clock again."""
        self._wake.set()

    def hear_of(self, domains: frozenset[str], seconds: float) -> None:
        """Wait until something was heard of each of these, even a failure; for so long at the most."""
        ends = self._clock() + seconds
        while not domains.isdisjoint(self._book.unheard) and self._clock() < ends:
            self._heard.wait(max(ends - self._clock(), 0.001))

    def _run(self) -> None:
        while True:
            self._wake.clear()
            while (domain := self._book.next(self._clock())) is not None:
                self._pool.spawn(self._look_up, domain)  # waits while there are enough
            self._wake.wait(self._book.idle(self._clock()))

    def _look_up(self, domain: str) -> None:
        server = self._server
        try:
            answer = self._apart.call(domain, _conduct, domain, server, self._patience)
        except Exception as error:  # no thread can be had; else the domain would never be asked for again
            answer = Answer(None, 0.0, str(error))
        if server != self._server:  # another one is asked already
            return
        entry = self._book.entries.get(domain)
        before = entry.doubt if entry is not None else ""
        changed = self._book.learn(domain, answer, self._clock())
        self._wake.set()
        self._heard.set()
        self._heard.clear()
        if entry is not None and answer.doubt != before:
            _tell(domain, answer)
        if changed:
            self._changed()


def _tell(domain: str, answer: Answer) -> None:
    """A failure when it begins, changes and ends; not each repetition."""
    if answer.doubt:
        log.note(log.Event.DNS, log.WARNING, "a domain of a block", domain=domain, reason=answer.doubt)
    else:
        log.note(log.Event.DNS, log.INFO, "a domain of a block can be looked up again", domain=domain)


# --- in a thread ---


def _conduct(domain: str, server: Endpoint | None, patience: float) -> Answer:
    """One look-up, from the first question to the answer. Touches nothing of the program's."""
    try:
        resolver = resolver_of(server, patience)
    except Exception as error:  # the system's resolv.conf: absent, or without a server
        return Answer(None, 0.0, f"no resolver: {str(error) or type(error).__name__}")
    ends = monotonic() + _TIMES * patience
    course = look_up(domain)
    reply = None
    try:
        while True:
            question = next(course) if reply is None else course.send(reply)
            left = ends - monotonic()
            reply = ask(resolver, question, left) if left > 0 else Reply(failure=_failed(question, "no time is left"))
    except StopIteration as end:
        answer: Answer = end.value
        return answer
    except Exception as error:  # of the library, which nobody would see in a thread; the domain is asked again
        return Answer(None, 0.0, type(error).__name__)


def resolver_of(server: Endpoint | None, patience: float) -> Any:
    """Asks this server, or the system's.

    Raises:
        Exception: the system's resolv.conf is of no use.
    """
    import dns.flags
    import dns.resolver  # a tenth of a second, for those only who have a block by domain

    resolver = dns.resolver.Resolver(configure=server is None)
    if server is not None:
        resolver.nameservers, resolver.port = [server.host], server.port
    resolver.search = []
    resolver.use_edns(0, 0, 1232)
    resolver.flags = dns.flags.RD | dns.flags.AD  # of the answer we want to hear, too (RFC 6840 section 5.7)
    resolver.lifetime = patience
    resolver.timeout = patience / 2
    return resolver


def ask(resolver: Any, question: Question, seconds: float) -> Reply:
    """One question, over TCP where the answer is too long for a datagram."""
    import dns.exception
    import dns.flags
    import dns.name
    import dns.resolver

    try:
        name = dns.name.from_text(question.name)
        found = resolver.resolve(
            name, question.kind, lifetime=min(seconds, resolver.lifetime), search=False, raise_on_no_answer=False
        )
    except dns.resolver.NXDOMAIN:
        return Reply(failure=_failed(question, "NXDOMAIN"), nxdomain=True)
    except dns.resolver.LifetimeTimeout:
        return Reply(failure=_failed(question, "no answer in time"))
    except dns.resolver.NoNameservers as error:
        codes = {str(each[4].rcode().name) for each in error.kwargs["errors"] if each[4] is not None}
        return Reply(failure=_failed(question, " ".join(sorted(codes)) or "no server can be asked"))
    except (dns.exception.DNSException, OSError, ValueError) as error:
        return Reply(failure=_failed(question, type(error).__name__))
    secure = bool(found.response.flags & dns.flags.AD)
    real = found.canonical_name.to_text(omit_final_dot=True).lower()
    return Reply(_records(question, found.rrset), float(found.chaining_result.minimum_ttl), secure=secure, name=real)


def _records(question: Question, records: Any) -> tuple[str, ...]:
    if records is None:
        return ()
    if question.kind == "MX":
        ranked = sorted(records, key=lambda record: (record.preference, record.exchange))
        return tuple([record.exchange.to_text(omit_final_dot=True).lower().strip(".") for record in ranked])
    if question.kind == "TLSA":
        return tuple(sorted(f"{each.usage} {each.selector} {each.mtype} {each.cert.hex()}" for each in records))
    return tuple([canonical_ip(record.address) for record in sorted(records)])


def _failed(question: Question, why: str) -> str:
    return f"{question.kind} of {question.name}: {why}"
