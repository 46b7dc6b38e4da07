"""Who is measured: our proxy, its peers, and no proxy at all. How each is configured and which doors it has."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from harness import builds
from harness.machine import BENCH, PURE, ROOT

SINK = "127.0.4.1:2525"
TLS_SINK = "127.0.4.2:2525"
SECRET = "a-secret-that-only-the-benchmark-knows"
_FIRST_PORT = 5100  # below the range of ephemeral ports, ten for each candidate
_OFFSETS = {"proxy": 0, "socks": 1, "native": 2, "redis": 3, "tls": 0}


@dataclass(frozen=True)
class Door:
    """One way into a candidate: where, and what the generator must say there."""

    address: str
    arguments: tuple[str, ...]


class Unavailable(Exception):
    """The candidate cannot be measured here; the text says what to install."""


@dataclass(frozen=True)
class Candidate:
    """`command` writes the configuration into a directory of its own and returns the command line; None: no process.

    Raises:
        Unavailable: out of `command`, when a program is missing.
    """

    name: str
    title: str
    command: Callable[[Candidate, Path], list[str]] | None
    port: int
    door_kinds: tuple[str, ...]  # of _OFFSETS; the first one is taken where a workload does not care
    settings: Mapping[str, str] = field(default_factory=dict)
    version: tuple[str, ...] = ()
    reads_stdout: bool = False  # its log goes through a pipe to a reader, as under systemd
    variant: str = ""  # what its driver does differently from those of the other rows, see `driven` and `tail`
    environ: Mapping[str, str] = field(default_factory=dict)

    def door_port(self, kind: str) -> int:
        return self.port + _OFFSETS[kind]

    def door(self, kind: str) -> Door | None:
        """The door of that kind ("any": its first one), or None."""
        if self.command is None:
            return Door(SINK, ("--handshake", "none"))
        kind = self.door_kinds[0] if kind == "any" else kind
        if kind not in self.door_kinds:
            return None
        arguments = {
            "proxy": ("--handshake", "v2", *(("--starttls",) if self.variant == "starttls" else ())),
            "socks": ("--handshake", "socks5", *self._socks_arguments),
            "native": ("--handshake", "native", *(("--brought-up",) if self.variant == "brought-up" else ())),
        }
        return Door(f"127.0.0.1:{self.door_port(kind)}", arguments.get(kind, ()))

    @property
    def for_generator(self) -> bool:
        """Whether the C generator can talk to it."""
        return bool({"proxy", "socks", "native"} & set(self.door_kinds))

    @property
    def reader(self) -> list[str]:
        """Who reads its log; a slow one takes 1 KB a second."""
        slow = "import os, time\nwhile os.read(0, 100): time.sleep(0.1)"
        return [sys.executable, "-c", slow] if self.variant == "stdout" else ["cat"]

    @property
    def _socks_arguments(self) -> tuple[str, ...]:
        if self.command is not _greenarrow:
            return ()
        return ("--user", "bench", "--password", SECRET, "--bind")


def program(name: str, package: str) -> str:
    """Where it is.

    Raises:
        Unavailable: with the package that brings it.
    """
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if not found:
        raise Unavailable(f"apt-get install {package}")
    return found


def _write_config(candidate: Candidate, directory: Path, template: str, **values: str) -> str:
    """Fills the @NAMES@ of a template in bench/peers/."""
    text = (BENCH / "peers" / template).read_text()
    ports = {f"{kind.upper()}_PORT": candidate.door_port(kind) for kind in _OFFSETS}
    for name, value in {**ports, "DIR": directory, **candidate.settings, **values}.items():
        text = text.replace(f"@{name}@", str(value))
    path = directory / template
    path.write_text(text)
    return str(path)


def _haproxy(candidate: Candidate, directory: Path) -> list[str]:
    return [program("haproxy", "haproxy"), "-db", "-f", _write_config(candidate, directory, "haproxy.cfg")]


def certificate(directory: Path) -> tuple[Path, Path]:
    """A fresh P-256 key and a certificate for it."""
    key, shown = directory / "key.pem", directory / "certificate.pem"
    make = [program("openssl", "openssl"), "req", "-x509", "-nodes", "-days", "30", "-subj", "/CN=bench"]
    make += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-keyout", str(key), "-out", str(shown)]
    subprocess.run(make, check=True, capture_output=True)
    return key, shown


def _haproxy_tls(candidate: Candidate, directory: Path) -> list[str]:
    """TLS ends at HAProxy. A P-256 key and no session tickets, as on our native door: the cheapest full handshake."""
    key, shown = certificate(directory)
    both = directory / "both.pem"
    both.write_text(shown.read_text() + key.read_text())
    config = _write_config(candidate, directory, "haproxy.cfg", BIND=f" ssl crt {both} no-tls-tickets")
    return [program("haproxy", "haproxy"), "-db", "-f", config]


def _nginx(candidate: Candidate, directory: Path) -> list[str]:
    nginx = program("nginx", "nginx libnginx-mod-stream")
    module = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
    config = _write_config(
        candidate,
        directory,
        "nginx.conf",
        MODULE=f"load_module {module};" if module.exists() else "",
        FILES=str(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
    )
    return [nginx, "-e", f"{directory}/nginx-errors.log", "-c", config]


def _dante(candidate: Candidate, directory: Path) -> list[str]:
    config = _write_config(candidate, directory, "danted.conf")
    return [program("danted", "dante-server"), "-f", config, "-p", f"{directory}/danted.pid"]


def _two_ports(candidate: Candidate) -> tuple[str, str]:
    return str(candidate.door_port("proxy")), str(candidate.door_port("socks"))


def _tokio(candidate: Candidate, _directory: Path) -> list[str]:
    try:
        builds.build_tokio_relay()
    except builds.BuildError as error:
        raise Unavailable(str(error)) from error
    return [str(builds.TOKIO_RELAY), *_two_ports(candidate)]


def project_python() -> str:
    """The project's own virtual environment where there is one."""
    inside = ROOT / ".venv" / "bin" / "python"
    return str(inside) if inside.exists() else sys.executable


def _classic(candidate: Candidate, _directory: Path) -> list[str]:
    script = BENCH / "peers" / "classic_gevent.py"
    return [project_python(), str(script), *_two_ports(candidate)]


def _greenarrow(candidate: Candidate, directory: Path) -> list[str]:
    program = ROOT / "greenarrow_proxy.py"
    if not program.exists():
        raise Unavailable("greenarrow_proxy.py is not there")
    config = _write_config(candidate, directory, "greenarrow_proxy.conf", SECRET=SECRET)
    return [project_python(), str(program), "--config-filename", config]


def _redis(candidate: Candidate, directory: Path) -> list[str]:
    port = str(candidate.door_port("redis"))
    redis = program("redis-server", "redis-server")
    return [redis, "--port", port, "--bind", "127.0.0.1", "--save", "", "--dir", str(directory)]


_QUIET = {"LOG_CONNECTIONS": "none", "TLS": "no", "MORE": ""}
_LOGGING = _QUIET | {"LOG_CONNECTIONS": "all"}
_TLS = _QUIET | {"TLS": "yes"}
_MANY_KEPT = _QUIET | {"MORE": "reuse_connections_max_idle 10m\nreuse_connections_max_cached_per_destination 2000\n"}
_MANY_KEPT["MORE"] += "reuse_connections_max_cached 2000\nreuse_connections_max_messages 1000000\n"
#: The generator's sources, and what it says in EHLO: with that name a source's connections are shared.
_NAMED = "".join(f"source s{n} {{\n  ip 127.0.2.{n}\n  ehlo mta1.sender.example.com\n}}\n" for n in range(1, 17))
_SMTP_OWN = _QUIET | {"MORE": "mode smtp\n"}
#: Nothing is closed while other candidates have their turn, and nobody finds the shelf full.
_SHARING = "".join(
    f"reuse_connections_{limit}\n"
    for limit in (
        "max_messages 1000000",
        "max_cached_per_destination 4000",
        "max_cached 4000",
        "max_idle 1h",
        "max_age 1h",
    )
)
_SMTP = _QUIET | {"MORE": f"mode smtp\n{_SHARING}{_NAMED}"}
_PLAIN = {"OPTIONS": "", "BIND": ""}
_SPLICE = {"OPTIONS": "option splice-auto", "BIND": ""}
_TCPLOG = {"OPTIONS": f"option tcplog\n    log {SINK} local0", "BIND": ""}
_BOTH = ("proxy", "socks")
_ALL = ("proxy", "socks", "native")

_TABLE = (
    ("greenarrow", "GreenArrow Proxy", _greenarrow, _ALL, _QUIET, (), False),
    ("greenarrow-log", "GreenArrow Proxy, log_connections all", _greenarrow, _ALL, _LOGGING, (), True),
    ("haproxy", "HAProxy", _haproxy, ("proxy",), _PLAIN, ("haproxy", "-v"), False),
    ("haproxy-splice", "HAProxy, splice-auto", _haproxy, ("proxy",), _SPLICE, (), False),
    ("haproxy-tcplog", "HAProxy, tcplog", _haproxy, ("proxy",), _TCPLOG, (), False),
    ("haproxy-tls", "HAProxy, TLS ends there", _haproxy_tls, ("tls",), {"OPTIONS": ""}, (), False),
    ("nginx", "nginx stream", _nginx, ("proxy",), {}, ("nginx", "-v"), False),
    ("tokio", "tokio copy relay", _tokio, _BOTH, {}, (), False),
    ("dante", "Dante", _dante, ("socks",), {}, ("danted", "-v"), False),
    ("classic", "classic gevent (two greenlets, sendall)", _classic, _BOTH, {}, (), False),
    ("redis", "redis INCR", _redis, ("redis",), {}, ("redis-server", "--version"), False),
    ("core", "the throttle core alone", None, (), {}, (), False),
    ("direct", "no proxy", None, _BOTH, {}, (), False),
)

#: Doors of rows that have not all of their program's: the first one is what the generator takes.
_DOORS = {
    "channel-socks": ("socks",),
    "channel-socks-python": ("socks",),
    "channel-warm": ("native",),
    "channel-warm-python": ("native",),
    "channel-mail": ("native",),
    "channel-mail-python": ("native",),
}

#: Rows that are our proxy (or a peer) again: name, title, who, settings, what the driver does differently.
_VARIANTS = (
    ("greenarrow-python", "GreenArrow Proxy, pure Python", "greenarrow", _QUIET, ""),
    ("greenarrow-python-log", "GreenArrow Proxy, pure Python, log_connections all", "greenarrow-log", _LOGGING, ""),
    ("core-python", "the throttle core alone, pure Python", "core", {}, ""),
    ("smtp-own", "mode smtp, a connection of its own each", "greenarrow", _SMTP_OWN, ""),
    ("smtp-shared", "mode smtp, shared connections", "greenarrow", _SMTP, ""),
    ("smtp-own-python", "mode smtp, a connection of its own each, pure Python", "greenarrow", _SMTP_OWN, ""),
    ("smtp-shared-python", "mode smtp, shared connections, pure Python", "greenarrow", _SMTP, ""),
    ("kept", "GreenArrow Proxy", "greenarrow", _SMTP, ""),
    ("kept-python", "GreenArrow Proxy, pure Python", "greenarrow", _SMTP, ""),
    ("channel-socks", "SOCKS5 with password and BIND", "greenarrow", _QUIET, ""),
    ("channel-socks-python", "SOCKS5 with password and BIND, pure Python", "greenarrow", _QUIET, ""),
    ("channel-warm", "a warm native channel", "greenarrow", _QUIET, ""),
    ("channel-warm-python", "a warm native channel, pure Python", "greenarrow", _QUIET, ""),
    ("channel-mail", "a warm native channel, the proxy says EHLO", "greenarrow", _QUIET, "brought-up"),
    ("channel-mail-python", "the same, pure Python", "greenarrow", _QUIET, "brought-up"),
    ("starttls-haproxy", "HAProxy, a handshake in C", "haproxy", _PLAIN, "starttls"),
    ("starttls-exim", "HAProxy, Exim's own handshake", "haproxy", _PLAIN, "starttls"),
    ("starttls-tcp", "mode tcp, a handshake in C", "greenarrow", _QUIET, "starttls"),
    ("native-socks", "SOCKS5 with password and BIND", "greenarrow", _QUIET, "socks"),
    ("native-fresh", "native, a fresh channel each", "greenarrow", _QUIET, "fresh"),
    ("native-warm", "native, a warm channel", "greenarrow", _QUIET, "warm"),
    ("native-tls-fresh", "native over TLS, a fresh channel each", "greenarrow", _TLS, "fresh"),
    ("native-tls-warm", "native over TLS, a warm channel", "greenarrow", _TLS, "warm"),
    ("mx-fresh", "a fresh connection each", "greenarrow", _QUIET, "fresh"),
    ("mx-kept", "a shared connection", "greenarrow", _QUIET, "kept"),
    ("mx-tls-fresh", "STARTTLS, a fresh connection each", "greenarrow", _QUIET, "tls-fresh"),
    ("mx-tls-kept", "STARTTLS, a shared connection", "greenarrow", _QUIET, "tls-kept"),
    ("throttles-0", "no throttle", "greenarrow", _QUIET, "0"),
    ("throttles-1k", "1,000 throttles", "greenarrow", _QUIET, "1000"),
    ("throttles-100k", "100,000 throttles", "greenarrow", _QUIET, "100000"),
    ("cached-0", "no other kept connection", "greenarrow", _MANY_KEPT, "0"),
    ("cached-1k", "1,000 other kept connections", "greenarrow", _MANY_KEPT, "1000"),
    ("tail-quiet", "undisturbed", "greenarrow-log", _LOGGING, "quiet"),
    ("tail-stdout", "the log's reader takes 1 KB/s", "greenarrow-log", _LOGGING, "stdout"),
    ("tail-mx", "50 MXs that take 160 KB/s", "greenarrow-log", _LOGGING, "mx"),
    ("tail-client", "200 clients that send a byte at a time", "greenarrow-log", _LOGGING, "client"),
    ("tail-burst", "5,000 connects at once", "greenarrow-log", _LOGGING, "burst"),
    ("tail-haproxy", "HAProxy, undisturbed", "haproxy", _PLAIN, "quiet"),
    ("tail-haproxy-burst", "HAProxy, 5,000 connects at once", "haproxy", _PLAIN, "burst"),
)


def _candidates() -> dict[str, Candidate]:
    found: dict[str, Candidate] = {}
    for name, title, command, doors, settings, version, reads in _TABLE:
        found[name] = Candidate(name, title, command, _port(len(found)), doors, settings, version, reads)
    for name, title, base, settings, variant in _VARIANTS:
        environ = PURE if "python" in name else {}
        found[name] = replace(
            found[base],
            name=name,
            title=title,
            port=_port(len(found)),
            settings=settings,
            variant=variant,
            environ=environ,
            door_kinds=_DOORS.get(name, found[base].door_kinds),
        )
    return found


def _port(index: int) -> int:
    return _FIRST_PORT + 10 * index


CANDIDATES = _candidates()
