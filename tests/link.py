"""The network between two programs, in the hands of a test: it stalls, parts them, or loses a reply.

    with Link(proxy.native) as link:
        ...clients connect to link.endpoint...
        link.freeze()

Who connects to it is a client, here; what stands behind it is the server.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading

from tests.clients import dial

Address = tuple[str, int]
_LINGER_RESET = struct.pack("ii", 1, 0)


class Link:
    """A relay to `address`; a context manager. `endpoint`: where the clients connect to.

    What they write while it is frozen stays in their connections, and goes on at once when it thaws; what the server
    writes always goes on. While it is parted nothing goes on in any direction, and who connects hears nothing.

    Attributes:
        lost: replies that it has lost.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint: Address = self._listener.getsockname()
        self.lost = 0
        self._selector = selectors.DefaultSelector()
        self._bell, self._button = socket.socketpair()
        self._others: dict[socket.socket, socket.socket] = {}
        self._clients: list[socket.socket] = []  # their ends, in the order in which they came
        self._frozen: list[socket.socket] = []
        self._to_lose = 0
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
        self._thread.join(30)
        for sock in (*self._others, self._listener, self._bell, self._button):
            sock.close()
        self._selector.close()

    def freeze(self, but: int = 0) -> None:
        """All connections that there are, but the first so many."""
        with self._lock:
            self._hold([sock for sock in self._clients[but:] if sock in self._others])

    def part(self) -> None:
        """Both sides see nothing of each other, and no end either."""
        with self._lock:
            self._hold([self._listener, *self._others])

    def thaw(self) -> None:
        """All goes on."""
        with self._lock:
            for sock in self._frozen:
                self._selector.register(sock, selectors.EVENT_READ)
            self._frozen = []
        self._button.send(b"!")

    def lose_replies(self, count: int = 1) -> None:
        """The server does what it is asked, and where its answer should come the client finds the connection reset."""
        with self._lock:
            self._to_lose = count

    @property
    def held(self) -> int:
        """On how many frozen connections something waits."""
        return sum(_readable(sock) for sock in list(self._frozen))

    @property
    def open(self) -> int:
        """Connections."""
        return len(self._others) // 2

    def _hold(self, sockets: list[socket.socket]) -> None:
        for sock in sockets:
            self._selector.unregister(sock)
        self._frozen = sockets

    def _run(self) -> None:
        while not self._over:
            ready = self._selector.select()
            with self._lock:
                for key, _ in ready:
                    self._serve(key.fileobj)  # type: ignore[arg-type]

    def _serve(self, sock: socket.socket) -> None:
        if sock is self._bell:
            sock.recv(1)
        elif sock in self._frozen:
            pass  # since the look
        elif sock is self._listener:
            self._accept()
        elif sock in self._others:
            data = b""
            with contextlib.suppress(OSError):
                data = sock.recv(65536)
                if data and self._to_lose and sock not in self._clients:
                    self._to_lose -= 1
                    self.lost += 1
                    self._others[sock].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
                    data = b""
                if data:
                    self._others[sock].sendall(data)
            if not data:
                self._end(sock)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = dial(self._address)
        except OSError:
            client.close()
            return
        self._clients.append(client)
        for one, other in ((client, server), (server, client)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._others[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _end(self, sock: socket.socket) -> None:
        for each in (sock, self._others[sock]):
            del self._others[each]
            if each in self._frozen:
                self._frozen.remove(each)
            else:
                self._selector.unregister(each)
            if each in self._clients:
                self._clients.remove(each)
            each.close()


def _readable(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return False
