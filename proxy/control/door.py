"""Listens on the control socket: who is there (SO_PEERCRED), one request a line, one answer a line.

Whoever can open the socket may look; root, the program's own user and members of `control_group` may change something,
and each change is one line in the log. It is served until the program ends, draining or not, and with descriptors that
are held back when all others are in use.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import socket as plain
import struct
from collections.abc import Iterator
from typing import NamedTuple

import gevent
from gevent import Timeout, socket

from proxy.control import commands
from proxy.control.changes import change
from proxy.control.commands import Answer, Command, Request
from proxy.control.house import House
from proxy.control.looks import look, traced
from proxy.errors import ConfigError, Mistake
from proxy.log import lines as log

#: Connections at a time; who is one too many is closed.
_MOST = 16
#: A connection that asks nothing for so long is closed; seconds.
_IDLE = 600.0
_CREDENTIALS = struct.Struct("3i")
_SO_PEERGROUPS = 59
_MOST_GROUPS = 4096


class Caller(NamedTuple):
    """Who is there, as the kernel says."""

    pid: int
    uid: int
    may_change: bool


def listen(path: str, mode: str, group: str | None) -> socket.socket:
    """The listening socket; an old one that nobody listens on any more is replaced.

    Raises:
        ConfigError: it cannot be had; says why.
    """
    address = "\0" + path[1:] if path.startswith("@") else path
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if not path.startswith("@"):
            _remove_dead(path)
        sock.bind(address)
        if not path.startswith("@"):
            os.chmod(path, int(mode, 8))  # before anybody can be let in
            if group is not None:
                os.chown(path, -1, grp.getgrnam(group).gr_gid)
        sock.listen(_MOST)
    except (OSError, KeyError) as error:
        sock.close()
        why = os.strerror(error.errno or 0) if isinstance(error, OSError) else f"there is no group {group}"
        raise ConfigError(f"control_socket {path}: {why}") from None
    return sock


def _remove_dead(path: str) -> None:
    with plain.socket(plain.AF_UNIX, plain.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


class ControlDoor:
    """One control socket.

    Args:
        path: for `close`. group: whose members may change something, beside root and us.
    """

    def __init__(self, sock: socket.socket, path: str, group: str | None, house: House) -> None:
        self.path = path
        sock.setblocking(False)
        self._sock = sock
        self._house = house
        self._group = grp.getgrnam(group).gr_gid if group is not None else None
        self._open: set[socket.socket] = set()
        self._greenlet = gevent.spawn(self._accept_forever)
        self._greenlet.rawlink(lambda _: sock.close())  # and not while it waits for it

    def close(self) -> None:
        """Listen no more; who is connected gets the answer in progress."""
        self._greenlet.kill(block=False)
        if not self.path.startswith("@"):
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    def _accept_forever(self) -> None:
        while True:
            try:
                with self._house.spare():
                    pass
                sock, _ = self._accept()
            except OSError:
                gevent.sleep(0.1)
                continue
            if len(self._open) >= _MOST:
                sock.close()
                continue
            self._open.add(sock)
            gevent.spawn(self._serve, sock)

    def _accept(self) -> tuple[socket.socket, object]:
        socket.wait_read(self._sock.fileno())  # accept() says EMFILE before it looks whether anybody is there
        try:
            return self._sock.accept()  # type: ignore[no-any-return]
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        with self._house.spare():  # it does not wait: others would take what is lent
            return self._sock.accept()  # type: ignore[no-any-return]

    def _serve(self, sock: socket.socket) -> None:
        try:
            caller = self._caller(sock)
            with sock.makefile("rb") as file:
                while line := self._line(file):
                    for answer in self._answers(line, caller):
                        sock.sendall(commands.encode(answer))
        except OSError:
            pass  # it is gone
        except Exception as error:
            log.internal_error("control socket", error)
        finally:
            self._open.discard(sock)
            sock.close()

    def _line(self, file: plain.SocketIO) -> bytes:
        with Timeout(_IDLE, False):
            return bytes(file.readline(commands.LONGEST_REQUEST))
        return b""

    def _caller(self, sock: socket.socket) -> Caller:
        packed = sock.getsockopt(plain.SOL_SOCKET, plain.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, gid = _CREDENTIALS.unpack(packed)
        groups = {gid}
        with contextlib.suppress(OSError):  # before Linux 4.13
            more = sock.getsockopt(plain.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MOST_GROUPS)
            groups.update(struct.unpack(f"{len(more) // 4}I", more))
        return Caller(pid, uid, uid in (0, os.geteuid()) or (self._group is not None and self._group in groups))

    def _answers(self, line: bytes, caller: Caller) -> Iterator[Answer]:
        try:
            if not line.endswith(b"\n"):
                raise Mistake("bad_request", "the line is too long, or has no end")
            request = commands.decode(line)
            command, arguments = commands.parse(request.command, caller.may_change)
        except Mistake as mistake:
            if mistake.code == "not_allowed":
                log.note(log.Event.CONTROL, log.WARNING, "refused", uid=caller.uid, pid=caller.pid, why=str(mistake))
            yield commands.refused(mistake.code, str(mistake))
            return
        try:
            if command.words == ("trace",):
                yield from traced(arguments, self._house)
            elif command.changes:
                yield self._change(command, arguments, request, caller)
            elif command.words == ("help",):
                yield commands.helped()
            else:
                yield look(command.words, arguments, self._house)
        except Mistake as mistake:
            yield commands.refused(mistake.code, str(mistake))

    def _change(self, command: Command, arguments: list[str], request: Request, caller: Caller) -> Answer:
        """
        Raises:
            Mistake: an argument cannot be understood.
        """
        words = " ".join((*command.words, *arguments))
        if request.dry_run:
            return commands.done(f"would do: {words}")
        answer = change(command.words, arguments, self._house, request.because)
        self._house.changed()
        result = "done" if answer.ok else answer.error
        because = {"because": request.because} if request.because else {}
        log.note(log.Event.CONTROL, log.INFO, words, uid=caller.uid, pid=caller.pid, result=result, **because)
        return answer
