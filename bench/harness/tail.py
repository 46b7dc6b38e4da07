"""What disturbs: a slow reader of the log, slow MXs, slow clients, a burst of connects. What others feel is measured.

The disturbance runs beside a load on a timetable, in this process or in a second generator; the slow reader of the log
comes with the candidate (`Candidate.reader`).
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator

from harness import smtp_driver
from harness.builds import GENERATOR
from harness.measure import Bench, Running

_SLOW_MX = ("127.0.4.3", 2525)
_MXS, _CLIENTS, _BURST = 50, 200, 5000
_BITE = 16384
_EVERY = 0.1
_BURST_AFTER = 1.0


@contextlib.contextmanager
def disturbed(bench: Bench, running: Running) -> Iterator[None]:
    disturb = {"mx": _slow_mxs, "client": _slow_clients, "burst": _burst}.get(running.candidate.variant)
    with disturb(bench, running) if disturb else contextlib.nullcontext():
        yield


def _door(running: Running) -> tuple[str, int]:
    return "127.0.0.1", running.candidate.door_port("proxy")


@contextlib.contextmanager
def _again_and_again(step: Callable[[], object]) -> Iterator[None]:
    """Does something every tenth of a second, in a thread."""
    over = threading.Event()

    def loop() -> None:
        while not over.wait(_EVERY):
            step()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def _slow_mxs(_bench: Bench, running: Running) -> Iterator[None]:
    """Clients that have more to say than their MXs want to hear."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(_SLOW_MX, backlog=_MXS))
        clients, mxs = [], []
        for _ in range(_MXS):
            client = stack.enter_context(socket.create_connection(_door(running), 10))
            client.sendall(smtp_driver.proxy_header(_SLOW_MX))
            mx, _ = listener.accept()
            mxs.append(stack.enter_context(mx))
            client.setblocking(False)
            clients.append(client)
        piece = bytes(1 << 18)

        def step() -> None:
            for client, mx in zip(clients, mxs, strict=True):
                with contextlib.suppress(BlockingIOError):
                    client.send(piece)
                mx.recv(_BITE)

        step()
        with _again_and_again(step):
            yield


@contextlib.contextmanager
def _slow_clients(_bench: Bench, running: Running) -> Iterator[None]:
    """Clients that never come to the end of their handshake; those that the proxy sends away come again."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(_door(running), 10)) for _ in range(_CLIENTS)]
        line = b"PROXY TCP4 127.0.2.1 127.0.4.1 1 " + b"1" * 60
        said = 0

        def step() -> None:
            nonlocal said
            for client in clients:
                with contextlib.suppress(OSError):
                    client.send(line[said : said + 1])
            said += 1

        with _again_and_again(step):
            yield


@contextlib.contextmanager
def _burst(bench: Bench, running: Running) -> Iterator[None]:
    """All at once in the middle, each with a message."""
    door = running.candidate.door("proxy")
    assert door is not None
    command = [str(GENERATOR), "load", "--target", "{}:{}".format(*smtp_driver.sink_address())]
    command += ["--proxy", door.address, *door.arguments, "--core", str(bench.cores.load)]
    command += ["--connections", str(_BURST), "--sessions", str(_BURST)]
    over = threading.Event()
    done: list[subprocess.CompletedProcess[bytes]] = []

    def later() -> None:
        if not over.wait(_BURST_AFTER):
            done.append(subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60, check=False))

    thread = threading.Thread(target=later)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
