"""The network between MTAs and the proxy: it can stop taking what the MTAs write, as one that stalls does."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading

from tests.clients import dial

Address = tuple[str, int]


class Link:
    """A relay to `address`; a context manager. `endpoint`: where the MTAs connect to.

    What they write while it is frozen stays in their connections, and goes on at once when it thaws. What the proxy
    writes always goes on.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint: Address = self._listener.getsockname()
        self._selector = selectors.DefaultSelector()
        self._bell, self._button = socket.socketpair()
        self._others: dict[socket.socket, socket.socket] = {}
        self._mtas: list[socket.socket] = []  # their ends, in the order in which they came
        self._spared = 0
        self._frozen: list[socket.socket] = []
        self._lock = threading.Lock()  # held while a connection is looked at or served
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Link:
        for sock in (self._listener, self._bell):
            self._selector.register(sock, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._button.send(b"!")
        self._thread.join(10)
        for sock in (*self._others, self._listener, self._bell, self._button):
            sock.close()
        self._selector.close()

    def freeze(self, but: int = 0) -> None:
        """All connections that there are, but the first so many."""
        with self._lock:
            self._frozen = [sock for sock in self._mtas[but:] if sock in self._others]
            for sock in self._frozen:
                self._selector.unregister(sock)

    def thaw(self) -> None:
        with self._lock:
            for sock in self._frozen:
                self._selector.register(sock, selectors.EVENT_READ)
            self._frozen = []
        self._button.send(b"!")

    @property
    def held(self) -> int:
        """On how many frozen connections something waits."""
        return sum(_readable(sock) for sock in list(self._frozen))

    def _run(self) -> None:
        while not self._over:
            ready = self._selector.select()
            with self._lock:
                for key, _ in ready:
                    self._serve(key.fileobj)  # type: ignore[arg-type]

    def _serve(self, sock: socket.socket) -> None:
        if sock is self._bell:
            sock.recv(1)
        elif sock is self._listener:
            mta, _ = sock.accept()
            proxy = dial(self._address)
            self._mtas.append(mta)
            for one, other in ((mta, proxy), (proxy, mta)):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._others[one] = other
                self._selector.register(one, selectors.EVENT_READ)
        elif sock in self._others and sock not in self._frozen:
            data = b""
            with contextlib.suppress(OSError):
                data = sock.recv(65536)
                if data:
                    self._others[sock].sendall(data)
            if not data:
                self._end(sock)

    def _end(self, sock: socket.socket) -> None:
        for each in (sock, self._others[sock]):
            del self._others[each]
            if each in self._frozen:
                self._frozen.remove(each)
            else:
                self._selector.unregister(each)
            each.close()


def _readable(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return False
