"""Listens on the control socket: who is there (SO_PEERCRED), one request a line, one answer a line.

Whoever can open the socket may look; root, the program's own user and members of `control_group` may change something,
and each change is one line in the log. It is served until the program ends, draining or not, and with descriptors that
are held back when all others are in use.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import grp
import os
import socket as plain
import struct
from collections.abc import Iterator
from time import monotonic
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
from proxy.stats import Limiter
from proxy.throttling.handover import Frozen

#: Connections at a time of those who may change something, and of the others; who is one too many is closed.
_MOST = 16
#: A connection that asks nothing for so long is closed; seconds.
_IDLE = 600.0
#: One that does not take its answer within so many seconds is closed, too.
_TAKEN_WITHIN = 60.0
_CREDENTIALS = struct.Struct("3i")
_SO_PEERGROUPS = 59
_MOST_GROUPS = 4096


class Caller(NamedTuple):
    """Who is there, as the kernel says."""

    pid: int
    uid: int
    groups: frozenset[int]


def gid_of(path: str, group: str | None) -> int | None:
    """The number of a group.

    Raises:
        ConfigError: there is none.
    """
    try:
        return None if group is None else grp.getgrnam(group).gr_gid
    except (KeyError, OSError):
        raise ConfigError(f"control_socket {path}: there is no group {group}") from None


def listen(path: str, mode: str, gid: int | None) -> socket.socket:
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
        _give_rights(path, mode, gid)  # before anybody can be let in
        sock.listen(_MOST)
    except OSError as error:
        sock.close()
        raise ConfigError(f"control_socket {path}: {os.strerror(error.errno or 0)}") from None
    return sock


def _give_rights(path: str, mode: str, gid: int | None) -> None:
    if not path.startswith("@"):
        os.chmod(path, int(mode, 8))
        if gid is not None:
            os.chown(path, -1, gid)


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


def _more_groups(fd: int) -> list[int]:
    """Those that the peer of a socket is in besides; none before Linux 4.13.

    By ctypes, since Python's getsockopt takes no more than 1024 bytes: some are in more than 256 groups.
    """
    groups = (ctypes.c_uint32 * _MOST_GROUPS)()
    length = ctypes.c_uint32(ctypes.sizeof(groups))
    if ctypes.CDLL(None).getsockopt(fd, plain.SOL_SOCKET, _SO_PEERGROUPS, groups, ctypes.byref(length)):
        return []
    return list(groups[: length.value // 4])


class ControlDoor:
    """One control socket.

    Args:
        path: for `close`. gid: of the group whose members may change something, beside root and us.
    """

    def __init__(self, sock: socket.socket, path: str, gid: int | None, house: House) -> None:
        self.path = path
        sock.setblocking(False)
        self._sock = sock
        self._house = house
        self._gid = gid
        self._refusals = Limiter()
        self._open: dict[socket.socket, Caller] = {}
        self._greenlet = gevent.spawn(self._accept_forever)
        self._greenlet.rawlink(lambda _: sock.close())  # and not while it waits for it

    def apply(self, mode: str, gid: int | None) -> None:
        """From now on others may open it, or change something; that holds for who is connected, too."""
        before, self._gid = self._gid, gid
        file_gid = os.getegid() if gid is None and before is not None else gid
        try:
            _give_rights(self.path, mode, file_gid)
        except OSError as error:
            log.note(log.Event.CONTROL, log.ERROR, f"control_socket {self.path}: {os.strerror(error.errno or 0)}")

    def fileno(self) -> int:
        """Of the listening socket."""
        return int(self._sock.fileno())

    def close(self, forget: bool = True) -> None:
        """Listen no more; who is connected gets the answer in progress.

        Args:
            forget: remove the file; not if another process listens there.
        """
        self._greenlet.kill(block=False)
        if forget and not self.path.startswith("@"):
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
            self._admit(sock)

    def _accept(self) -> tuple[socket.socket, object]:
        socket.wait_read(self._sock.fileno())  # accept() says EMFILE before it looks whether anybody is there
        try:
            return self._sock.accept()  # type: ignore[no-any-return]
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        with self._house.spare():  # it does not wait: others would take what is lent
            return self._sock.accept()  # type: ignore[no-any-return]

    def _admit(self, sock: socket.socket) -> None:
        """Serve it in a greenlet, unless there are enough of its kind: who may only look keeps no administrator out."""
        try:
            caller = self._caller(sock)
        except OSError:
            sock.close()
            return
        may_change = self._may_change(caller)
        if sum(1 for each in self._open.values() if self._may_change(each) == may_change) >= _MOST:
            sock.close()
            return
        self._open[sock] = caller
        gevent.spawn(self._serve, sock, caller)

    def _serve(self, sock: socket.socket, caller: Caller) -> None:
        try:
            with sock.makefile("rb") as file:
                while line := self._line(file):
                    for answer in self._answers(line, caller):
                        with Timeout(_TAKEN_WITHIN, TimeoutError):
                            sock.sendall(commands.encode(answer))
        except OSError:
            pass  # it is gone
        except Exception as error:
            log.internal_error("control socket", error)
        finally:
            del self._open[sock]
            sock.close()

    def _line(self, file: plain.SocketIO) -> bytes:
        with Timeout(_IDLE, False):
            return bytes(file.readline(commands.LONGEST_REQUEST))
        return b""

    def _caller(self, sock: socket.socket) -> Caller:
        packed = sock.getsockopt(plain.SOL_SOCKET, plain.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, gid = _CREDENTIALS.unpack(packed)
        return Caller(pid, uid, frozenset({gid, *_more_groups(sock.fileno())}))

    def _may_change(self, caller: Caller) -> bool:
        return caller.uid in (0, os.geteuid()) or self._gid in caller.groups

    def _answers(self, line: bytes, caller: Caller) -> Iterator[Answer]:
        self._refusals.expired(monotonic())
        try:
            if not line.endswith(b"\n"):
                raise Mistake("bad_request", "the line is too long, or has no end")
            request = commands.decode(line)
            command, arguments = commands.parse(request.command, self._may_change(caller))
        except Mistake as mistake:
            if mistake.code == "not_allowed" and self._refusals.admit(str(caller.uid), monotonic()):
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
        except Frozen as error:
            yield commands.refused("not_now", str(error))

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
