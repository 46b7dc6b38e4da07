"""Outgoing connections: bind to the requested local address, connect, say exactly what failed.

The one place where an errno of an outgoing socket becomes an outcome. Which source may be used, which destination may
be reached and how long all of it may take is decided elsewhere; what is said over the connection is not known here.
"""

from __future__ import annotations

import errno
import os
from _socket import SOCK_CLOEXEC, SOCK_DGRAM
from collections.abc import Callable
from functools import lru_cache
from select import EPOLLERR, EPOLLHUP, EPOLLOUT
from time import monotonic
from typing import Final

from proxy.errors import Overloaded, ProxyError, SourceMissing, Step, UpstreamError
from proxy.model import Endpoint
from proxy.net.addresses import own_addresses
from proxy.net.alarm import TimeIsUp
from proxy.net.conversation import watch_over
from proxy.net.relay import Engine, RawSocket
from proxy.net.sockets import family_of, outgoing
from proxy.policy.access import Access
from proxy.spans import SPANS

#: A client's connect takes no longer, whatever time it has: a receiver that is not there is to be told of.
LONGEST_CONNECT: Final = 50.0
_CONNECTED_OR_NOT: Final = EPOLLOUT | EPOLLERR | EPOLLHUP
_ANY_PORT: Final = 9  # where nothing is sent to
_OUT_OF_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def bind(source: str) -> RawSocket:
    """A non-blocking TCP socket bound to `source`, any port.

    The watch over a dead peer (`relay.keep_alive`) begins later, for those that live long: it is five system calls and
    a timer of the kernel, and the connect has a deadline of its own.

    Raises:
        SourceMissing: the address is not on this machine, whatever bind() says.
        UpstreamError: step `bind`; it may not be used.
        Overloaded: no descriptor or memory for one more socket.
    """
    try:
        sock = outgoing(family_of(source))
    except OSError as error:
        raise _no_socket(error, Step.BIND) from None
    try:
        sock.bind((source, 0))
    except OSError as error:
        sock.close()
        number = error.errno or 0
        if number == errno.EADDRNOTAVAIL:
            raise SourceMissing(source) from None
        raise UpstreamError(f"bind {source}: {os.strerror(number)}", Step.BIND, number) from None
    except BaseException:
        sock.close()
        raise
    if source not in own_addresses():
        sock.close()
        raise SourceMissing(source)
    return sock


def connect(
    engine: Engine,
    sock: RawSocket,
    source: str,
    destination: Endpoint,
    timeout: float,
    begun: Callable[[RawSocket], None] | None = None,
) -> int:
    """Connect a bound socket; it is registered with the engine from now on. Closes nothing, whatever happens.

    Args:
        source: the address that the socket is bound to, for the error's text.
        timeout: seconds.
        begun: is called when the local port is known, before anybody can have accepted the connection.

    Returns:
        The epoll events that came with the connection: the peer's first bytes, or its end; 0: none of these.

    Raises:
        Overloaded: no memory to watch over one more socket.
        UpstreamError: step `connect`, with the errno; a timeout is ETIMEDOUT, no free port is EADDRNOTAVAIL.
    """
    began = monotonic()
    number = sock.connect_ex(destination)
    if begun is not None:
        begun(sock)
    watch_over(engine, sock)
    events = 0
    if number == errno.EINPROGRESS:
        alarm = engine.alarms.start(timeout)
        try:
            number, events = _await(engine, sock, destination)
        except TimeIsUp as fired:
            if fired.alarm is not alarm:
                raise
            number = errno.ETIMEDOUT
        finally:
            alarm.cancel()
    if number:
        raise UpstreamError(f"connect {source} -> {destination}: {_why(number)}", Step.CONNECT, number)
    SPANS.connect.observe(monotonic() - began)
    return events & ~EPOLLOUT


def _await(engine: Engine, sock: RawSocket, destination: Endpoint) -> tuple[int, int]:
    """Wait until the connect is decided.

    A socket that is writable and nothing else is connected: it was registered after its connect began, so this is no
    older event. In all other cases a second connect tells it (0, or the errno), whatever woke us.
    """
    fd = sock.fileno()
    while True:
        events = engine.wait(fd)
        if events & _CONNECTED_OR_NOT == EPOLLOUT:
            return 0, events
        number = sock.connect_ex(destination)
        if number != errno.EALREADY:
            return (0 if number == errno.EISCONN else number), events


def _why(number: int) -> str:
    if number == errno.EADDRNOTAVAIL:
        return "no free local port for this source and destination"
    return os.strerror(number)


def local_endpoint(sock: RawSocket) -> Endpoint:
    """The real local address of a socket."""
    name = sock.getsockname()
    return Endpoint(name[0], name[1])


def system_source(destination: Endpoint) -> str:
    """The local address that the system would leave from. A connected UDP socket tells it and sends nothing.

    Raises:
        UpstreamError: step `connect`; there is no route.
        Overloaded: no descriptor.
    """
    try:
        sock = RawSocket(family_of(destination.host), SOCK_DGRAM | SOCK_CLOEXEC, 0)
    except OSError as error:
        raise _no_socket(error, Step.CONNECT) from None
    try:
        sock.connect(destination)
        host: str = sock.getsockname()[0]
    except OSError as error:
        # Without a single address of this family, as where IPv6 is switched off, there is no way either.
        number = errno.ENETUNREACH if error.errno == errno.EADDRNOTAVAIL else error.errno or 0
        raise UpstreamError(f"route to {destination.host}: {os.strerror(number)}", Step.CONNECT, number) from None
    finally:
        sock.close()
    return host


def source_for(
    access: Access,
    instance: str,
    client: RawSocket,
    wanted: str | None,
    destination: Endpoint,
    listener: Endpoint | None = None,
) -> str:
    """The address to leave from: the wanted one, else the configured default, else the system's choice.

    Args:
        client: the client's socket; its local address is the one that was dialled (`default_source_ip same`).
        listener: where it came in, as it was configured; None: a native listener.

    Raises:
        DestinationNotAllowed: no source is looked for, for what is denied.
        UpstreamError, Overloaded: as `system_source`.
    """
    if wanted is not None:
        return wanted
    access.check_destination(destination)
    default = access.default_source(instance, destination, local_endpoint(client).host, listener)
    return default or _route(destination.host, int(monotonic()))


@lru_cache(maxsize=1024)
def _route(host: str, _second: int) -> str:
    """`system_source`, asked once a second for each destination; it is four system calls.

    Safe for so short a time: should the routes change meanwhile, the address is still one of ours and may be bound, or
    the bind says that it is not, which is told to the client as temporary. A failure is not remembered.
    """
    return system_source(Endpoint(host, _ANY_PORT))


def _no_socket(error: OSError, step: Step) -> ProxyError:
    number = error.errno or 0
    text = f"no outgoing socket: {os.strerror(number)}"
    return Overloaded(text) if number in _OUT_OF_DESCRIPTORS else UpstreamError(text, step, number)
