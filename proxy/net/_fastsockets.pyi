"""For mypy: see `proxy.net.sockets`."""

from typing import Any

from proxy.net.relay import RawSocket

class Socket(RawSocket): ...

def accept(listener: Any) -> tuple[RawSocket, tuple[str, int]]: ...
def outgoing(family: int) -> RawSocket: ...
