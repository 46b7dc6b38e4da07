"""A server that keeps to the protocol until it is told not to: what it answers to a command is a test's to say.

It lives in the test's own loop, so what it has done is known whenever the test runs.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable
from typing import Any

import gevent.server
from gevent.pool import Pool

from proxy.store.wire import NOTHING, Replies

INFO = (
    b"valkey_version:9.0.0\r\nserver_name:valkey\r\nserver_mode:standalone\r\nrun_id:r1\r\nrole:master\r\n"
    b"master_replid:p1\r\nmaxmemory:0\r\n"
)


def bulk(text: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(text), text)


class Fake:
    """One such server.

    Args:
        answers: first word of a command, in capitals → bytes, or what makes them of its words and the socket; None: no
            answer. Of what is not in it: OK.

    Attributes:
        asked: how often, by first word. connects: how many have come.
    """

    def __init__(self, **answers: bytes | Callable[[list[bytes], Any], bytes | None] | None) -> None:
        self.answers: dict[str, Any] = {"INFO": bulk(INFO), "EVALSHA": b"*1\r\n:7\r\n"} | answers
        self.asked: Counter[str] = Counter()
        self.connects = 0
        self._serving = Pool()
        self._server = gevent.server.StreamServer(("127.0.0.2", 0), self._serve, spawn=self._serving)

    def __enter__(self) -> Fake:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()
        self._serving.kill()

    @property
    def where(self) -> str:
        return f"127.0.0.2:{self._server.server_port}"

    @property
    def url(self) -> str:
        return f"redis://{self.where}"

    def _serve(self, sock: Any, peer: object) -> None:
        self.connects += 1
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        commands = Replies()
        try:
            while data := sock.recv(65536):
                commands.feed(data)
                while (words := commands.next()) is not NOTHING:
                    self._answer(words, sock)
        except OSError:
            return  # we were left, or have closed it ourselves

    def _answer(self, words: list[bytes], sock: Any) -> None:
        name = words[0].decode().upper()
        self.asked[name] += 1
        answer = self.answers.get(name, b"+OK\r\n")
        if callable(answer):
            answer = answer(words, sock)
        if answer is not None:
            sock.sendall(answer)
