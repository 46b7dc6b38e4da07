"""Which server it is: the configured one, or the master that Sentinels name.

All Sentinels are asked at once, and the newest word counts: each change of the master has a larger epoch. Only the word
of one that sees the majority of them counts at all (SENTINEL CKQUORUM): on the other side of a broken network there may
be a second master by now, of which the proxies over there have the whole of each limit. Whoever is cut off with the old
one must not go on with it. Whoever is named must say itself that it is a master.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import gevent

from proxy.store.dial import Dialler, name_of
from proxy.store.link import Link
from proxy.store.servers import Server, Trouble
from proxy.store.wire import ErrorReply, command

#: Seconds for one Sentinel, and between two looks at them. Cut off from each other, they know it as soon as those on
#: the other side know that they have to name a new master, which then takes them a second or so.
PATIENCE = 1.0
LOOK = 0.5
_QUESTIONS = (b"get-master-addr-by-name", b"MASTER", b"CKQUORUM")


def usable(found: tuple[Link, Server]) -> tuple[Link, Server]:
    """The same, if it is a master that is new enough.

    Raises:
        Trouble: step `role` or `version`; the connection is closed.
    """
    link, server = found
    trouble = None
    if not server.is_master:
        trouble = Trouble(
            "role", link.where, f"it is a replica, of {server.master or 'nobody'}: name its master instead"
        )
    elif server.too_old:
        trouble = Trouble("version", link.where, server.too_old)
    if trouble is not None:
        link.close(trouble)
        raise trouble
    return found


class Word(NamedTuple):
    """What one Sentinel says. epoch: -1 if it does not say one."""

    epoch: int
    master: tuple[str, int]


class Sentinels:
    """All that are named.

    Args:
        dialler: towards the Sentinels, with their credentials. to_master: towards what they name.
        service: as they call it.
    """

    def __init__(self, dialler: Dialler, to_master: Dialler, servers: Sequence[tuple[str, int]], service: str) -> None:
        self._dialler, self._to_master, self._servers = dialler, to_master, tuple(servers)
        self._service = service.encode()
        self._links: dict[tuple[str, int], Link] = {}
        self._master: tuple[str, int] | None = None

    def find(self) -> tuple[Link, Server]:
        """A connection to the master.

        Raises:
            Trouble: why there is none.
        """
        self._master = self.ask()
        return usable(self._to_master.connect(self._master))

    def still(self, server: Server) -> None:
        """Whether they name the same master as before.

        Raises:
            Trouble: step `sentinel`; they name another one, or none that sees the others can be asked.
        """
        named = self.ask()
        if named != self._master and self._master is not None:
            raise Trouble("sentinel", name_of(self._master), f"the master is {name_of(named)} now")

    def stop(self) -> None:
        for link in self._links.values():
            link.close(Trouble("sentinel", link.where, "not wanted any more"))
        self._links.clear()

    def ask(self) -> tuple[str, int]:
        """Who is the master.

        Raises:
            Trouble: none of them knows, or is one of the majority; of the first.
        """
        asking = [gevent.spawn(self._ask_or_trouble, server) for server in self._servers]
        try:
            gevent.joinall(asking, PATIENCE)
        finally:
            for server, each in zip(self._servers, asking, strict=True):
                if not each.ready():
                    each.kill(block=False)
                    self._forget(server)  # or questions would heap up there
        answers = [each.value for each in asking if each.ready()]
        words = [answer for answer in answers if isinstance(answer, Word)]
        if words:
            return max(words, key=lambda word: word.epoch).master
        troubles = [answer for answer in answers if isinstance(answer, Trouble)]
        if troubles:
            first = troubles[0]
            more = f" (and so on, of {len(self._servers)})" if len(self._servers) > 1 else ""
            raise Trouble(first.step, first.where, f"{first.reason}{more}", first.number, first.reply)
        where = ", ".join(map(name_of, self._servers))
        raise Trouble("sentinel", where, f"no answer within {PATIENCE:g} s")

    def _forget(self, server: tuple[str, int]) -> None:
        link = self._links.pop(server, None)
        if link is not None:
            link.close(Trouble("sentinel", link.where, f"no answer within {PATIENCE:g} s"))

    def _ask_or_trouble(self, server: tuple[str, int]) -> Word | Trouble:
        try:
            return self._ask(server)
        except Trouble as trouble:
            return trouble

    def _ask(self, server: tuple[str, int]) -> Word:
        link = self._links.get(server)
        if link is None or link.trouble is not None:
            link = self._links[server] = self._reach(server)
        questions = [command(b"SENTINEL", word, self._service) for word in _QUESTIONS]
        address, state, quorum = link.ask(questions, PATIENCE, "sentinel")
        if isinstance(address, ErrorReply):
            unknown = address.code == "NOAUTH"
            link.close(trouble := link.refusal("auth" if unknown else "sentinel", address))
            raise trouble
        if address is None:
            raise Trouble("sentinel", link.where, f"it knows no service {self._service.decode()}")
        if isinstance(quorum, ErrorReply) and quorum.code == "NOQUORUM":
            raise link.refusal("sentinel", quorum)
        return Word(_epoch(state), _address(address, link.where))

    def _reach(self, server: tuple[str, int]) -> Link:
        link = self._dialler.reach(server)
        login = self._dialler.credentials.command
        if login:
            # A Sentinel that asks for none may not know this user, or say that it needs no password: it answers all the
            # same. One that does ask says so again to the question.
            link.ask(login, PATIENCE, "auth")
        return link


def _address(reply: Any, where: str) -> tuple[str, int]:
    try:
        host, port = reply
        number = int(port)
        if not host or not 1 <= number <= 65535:
            raise ValueError
        return host.decode("ascii"), number
    except (TypeError, ValueError, AttributeError):
        raise Trouble("sentinel", where, "it names a master without an address") from None


def _epoch(reply: Any) -> int:
    """SENTINEL MASTER: names and values by turns."""
    if isinstance(reply, list):
        fields = dict(zip(reply[::2], reply[1::2], strict=False))
        epoch = fields.get(b"config-epoch", b"")
        if isinstance(epoch, bytes) and epoch.isdigit():
            return int(epoch)
    return -1
