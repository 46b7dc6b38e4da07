"""What becomes of some calls of one script: sent, answered, perhaps sent once more, given up.

Once more goes only what has certainly not run: the server did not know the script, or another server has the key. A
round is `send`, then waiting for its batches, then `take`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from proxy.store.calls import Call, Fate, Reply, Script
from proxy.store.link import Batch, Link
from proxy.store.node import Node
from proxy.store.servers import Server, Trouble, ran_nothing
from proxy.store.slots import Redirect, redirect_of
from proxy.store.wire import ErrorReply, command, script_call

#: Times that a call may be sent: an unknown script, a key that has moved, and that is moving.
ROUNDS = 4
#: Nanoseconds that a server may owe an answer before it gets no more calls.
PATIENCE_NS = 100_000_000
#: In replies after which the server is of no use, and must be found anew; the first also out of a script.
_WRONG_SERVER = ("READONLY", "LOADING", "MASTERDOWN", "NOAUTH")

#: A step: nothing is the matter, and it has not been long.
BEGINNING = "beginning"

Route = Node | Trouble


class _Sent(NamedTuple):
    """What went to one server in one round.

    Args:
        at: place of a call → place of its answer among those of the batch.
    """

    node: Node
    link: Link
    identity: str
    batch: Batch
    at: dict[int, int]


class Calling:
    """Some calls on their way.

    Args:
        route: who has a key. redirected: who is to be asked instead.

    Attributes:
        left: the calls that may go out (again), by their place, and to whom.
    """

    def __init__(
        self,
        script: Script,
        calls: Sequence[Call],
        clock: Callable[[], int],
        route: Callable[[bytes], Route],
        redirected: Callable[[Redirect], Route],
    ) -> None:
        self._script, self._calls, self._clock, self._redirected = script, calls, clock, redirected
        self._began = clock()
        self._replies: dict[int, Reply] = {}
        self._last: dict[int, Trouble] = {}
        self._sent: list[_Sent] = []
        self._asking: set[int] = set()
        self._load: set[Node] = set()
        self.left: dict[int, Route] = {place: route(call.keys[0]) for place, call in enumerate(calls)}

    def send(self) -> list[Batch]:
        """Send what is left, that of one server together."""
        groups: dict[Node, list[int]] = {}
        for place, route in self.left.items():
            if isinstance(route, Trouble):
                self._give_up(place, route)
            else:
                groups.setdefault(route, []).append(place)
        self.left = {}
        for node, places in groups.items():
            try:
                self._sent.append(self._send_to(node, places))
            except Trouble as trouble:
                for place in places:
                    self._give_up(place, trouble)
        self._asking, self._load = set(), set()
        return [each.batch for each in self._sent]

    def take(self) -> None:
        """What came of it; what may go out once more is in `left`."""
        for sent in self._sent:
            if sent.batch.missing:
                sent.link.catch_up()
                sent.batch.given_up = bool(sent.batch.missing)
            for place, at in sent.at.items():
                if at < len(sent.batch.replies):
                    self._answered(place, sent.batch.replies[at], sent)
                else:
                    reason = f"no answer within {PATIENCE_NS // 1_000_000} ms"
                    trouble = sent.batch.broken or Trouble("call", sent.link.where, reason)
                    self._reply(place, Fate.LOST, trouble)
        self._sent = []

    def replies(self) -> list[Reply]:
        """What became of each; what is left is given up."""
        for place in self.left:
            self._give_up(place, self._last[place])
        return [self._replies[place] for place in range(len(self._calls))]

    def _send_to(self, node: Node, places: Sequence[int]) -> _Sent:
        """Send these calls.

        Raises:
            Trouble: nothing can be sent to this server now.
        """
        link, server = self._fit(node)
        script = self._script
        commands = [command(b"SCRIPT", b"LOAD", script.source)] if node in self._load else []
        at: dict[int, int] = {}
        for place in places:
            if place in self._asking:
                commands.append(command(b"ASKING"))
            at[place] = len(commands)
            call = self._calls[place]
            commands.append(script_call(script.digest, call.keys, call.arguments))
        return _Sent(node, link, server.identity, link.send(commands), at)

    def _fit(self, node: Node) -> tuple[Link, Server]:
        """The connection, if something may be sent there now.

        Raises:
            Trouble: why not.
        """
        if node.live is None:
            ended = node.link.trouble if node.link is not None else None
            raise ended or node.trouble or Trouble(BEGINNING, "-", "not connected yet")
        link, server = node.live
        if link.owes(PATIENCE_NS):
            raise Trouble("call", link.where, "it owes an answer for longer than 100 ms")
        return link, server

    def _answered(self, place: int, answer: Any, sent: _Sent) -> None:
        if not isinstance(answer, ErrorReply):
            batch = sent.batch
            self._replies[place] = Reply(Fate.ANSWERED, answer, None, batch.sent_ns, batch.received_ns, sent.identity)
            return
        trouble = sent.link.refusal("call", answer)
        if any(word in trouble.reply for word in _WRONG_SERVER):
            sent.node.give_up(trouble)
        if not ran_nothing(answer):
            self._reply(place, Fate.LOST, trouble)
            return
        self._last[place] = trouble
        redirect = redirect_of(answer, sent.link.where.rpartition(":")[0].strip("[]"))
        if redirect is not None:
            self.left[place] = self._redirected(redirect)
            if not redirect.for_good:
                self._asking.add(place)
        elif answer.code == "NOSCRIPT":
            self._load.add(sent.node)
            self.left[place] = sent.node
        else:
            self._reply(place, Fate.REFUSED, trouble)

    def _give_up(self, place: int, trouble: Trouble) -> None:
        """It cannot go out (again): not at all, or the server has refused it."""
        refused = place in self._last
        self._reply(place, Fate.REFUSED if refused else Fate.UNSENT, self._last[place] if refused else trouble)

    def _reply(self, place: int, fate: Fate, trouble: Trouble) -> None:
        self._replies[place] = Reply(fate, None, trouble, self._began, self._clock())
