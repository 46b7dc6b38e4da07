"""What a real MTA's own TLS costs: Exim hands one message after another to the sink, in clear and with STARTTLS.

The difference is what it saves when somebody else encrypts: a process that loads its library and the system's
authorities, a full handshake, the message's encryption. An MTA that keeps its process pays less; the generator's
handshake, beside it in the table, is the least that there can be.
"""

from __future__ import annotations

import os
import statistics
import subprocess
from pathlib import Path

from harness.candidates import Unavailable, program
from harness.machine import BENCH, BUILD

_DIRECTORY = BUILD / "run" / "exim"
_MESSAGE = (
    b"Subject: a message\n\n" + b"The quick brown fox jumps over the lazy dog, again and again and once more.\n" * 263
)
_TLS = {"clear": "hosts_avoid_tls", "encrypted": "hosts_require_tls"}


def _configurations(sink: tuple[str, int], directory: Path) -> dict[str, Path]:
    for place in (directory, directory / "spool"):
        place.mkdir(parents=True, exist_ok=True)
        place.chmod(0o777)  # Exim gives up root for a user of its own
    template = (BENCH / "peers" / "exim.conf").read_text()
    host, port = sink
    made = {}
    for name, option in _TLS.items():
        text = template
        for key, value in {"DIR": directory, "HOST": host, "PORT": port, "TLS": option}.items():
            text = text.replace(f"@{key}@", str(value))
        made[name] = directory / f"{name}.conf"
        made[name].write_text(text)
        made[name].chmod(0o644)
    return made


def _send(exim: str, configuration: Path) -> float:
    """CPU seconds of Exim and of all processes that it starts for the message.

    Raises:
        Unavailable: it does not deliver.
    """
    command = [exim, "-C", str(configuration), "-odi", "-oi", "-f", "bounce@sender.example.com", "to@example.net"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as sent:
        assert sent.stdin is not None
        sent.stdin.write(_MESSAGE)
        sent.stdin.close()
        _, status, used = os.wait4(sent.pid, 0)
        sent.returncode = os.waitstatus_to_exitcode(status)
    if sent.returncode:
        raise Unavailable(f"Exim ended with {sent.returncode}, see mainlog in {configuration.parent}")
    return used.ru_utime + used.ru_stime


def own_tls(sink: tuple[str, int], pairs: int = 20, directory: Path = _DIRECTORY) -> float:
    """Microseconds of CPU for a message with TLS, less those for one without: the median of pairs.

    Raises:
        Unavailable: there is no Exim, or it does not deliver.
    """
    exim = program("exim4", "exim4-daemon-light")
    configurations = _configurations(sink, directory)
    spent = [(_send(exim, configurations["clear"]), _send(exim, configurations["encrypted"])) for _ in range(pairs)]
    return statistics.median(encrypted - clear for clear, encrypted in spent) * 1e6
