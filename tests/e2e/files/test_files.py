"""The files beside the program: unit, init script, man pages, Makefile, shell scripts; each judged by its own tool."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from greenarrow_proxy_client import Session
from proxy.config.layers import build_parser
from proxy.control.commands import COMMANDS
from tests.clients import DOORS
from tests.peers import program as tool
from tests.program import SECRET, Proxy
from tests.sinks import Sink

pytestmark = pytest.mark.either_form("files beside the program")

ROOT = Path(__file__).resolve().parents[3]
INIT = ROOT / "etc" / "greenarrow_proxy.init"
SHELL_SCRIPTS = [
    *("etc/greenarrow_proxy.init", "tests/fetch_smtp_sink.sh", "tests/fetch_node_peers.sh", ".ci/run"),
    *("packaging/build_deb.sh", "packaging/lock.sh", "packaging/debian/tidy"),
]
MAINTAINER_SCRIPTS = [f"packaging/debian/greenarrow-proxy.{name}" for name in ("postinst", "postrm", "prerm")]


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, **options)  # type: ignore[call-overload]


# ---------------------------------------------------------------- systemd


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, with a program and a configuration that exist at the path in ExecStart."""
    program = tmp_path / "greenarrow_proxy"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for name in ("greenarrow_proxy.service", "greenarrow_proxy.socket"):
        text = (ROOT / "etc" / name).read_text()
        (tmp_path / name).write_text(text.replace("/opt/greenarrow/", f"{tmp_path}/"))
    return tmp_path


@pytest.mark.parametrize("name", ["greenarrow_proxy.service", "greenarrow_proxy.socket"])
def test_systemd_accepts_the_unit(units: Path, name: str) -> None:
    done = run(tool("systemd-analyze"), "verify", "--man=no", units / name)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_is_hardened(units: Path) -> None:
    done = run(tool("systemd-analyze"), "security", "--offline=true", "--no-pager", units / "greenarrow_proxy.service")
    match = re.search(r"Overall exposure level for greenarrow_proxy.service: (\d+\.\d)", done.stdout)
    assert match, done.stderr
    assert float(match[1]) <= 2.0


def test_the_unit_says_what_is_documented() -> None:
    lines = (ROOT / "etc" / "greenarrow_proxy.service").read_text().splitlines()
    for line in (
        "Description=GreenArrow Proxy",
        "Type=notify",
        "NotifyAccess=all",
        "ExecStart=/opt/greenarrow/greenarrow_proxy --config-filename=/opt/greenarrow/greenarrow_proxy.conf",
        "ExecReload=/opt/greenarrow/greenarrow_proxy --check-config "
        "--config-filename=/opt/greenarrow/greenarrow_proxy.conf",
        "ExecReload=/bin/sh -c 'kill -HUP $$MAINPID'",
        "StartLimitIntervalSec=0",
        "SystemCallFilter=@chown",
        "AmbientCapabilities=CAP_NET_BIND_SERVICE",
        "LogRateLimitIntervalSec=0",
        "LimitNOFILE=262144",
    ):
        assert lines.count(line) == 1, line
    reloads = [line for line in lines if line.startswith("ExecReload=")]
    assert ["--check-config" in line for line in reloads] == [True, False]  # in this order
    assert "ProcSubset=pid" not in lines  # it hides /proc/stat, without which there are no process_* metrics
    (after,) = (line for line in lines if line.startswith("After="))
    assert {"network.target", "iptables.service", "firewalld.service"} <= set(after.removeprefix("After=").split())
    (user,) = (line for line in lines if line.startswith("User="))
    assert user != "User=root"


def allowed_by_filter(name: str) -> set[str]:
    """The system calls in one of systemd's named sets."""
    calls = set()
    for line in run(tool("systemd-analyze"), "syscall-filter", "--no-pager", name).stdout.splitlines()[1:]:
        entry = line.strip()
        if entry.startswith("@"):
            calls |= allowed_by_filter(entry)
        elif entry and not entry.startswith("#"):
            calls.add(entry)
    return calls


def test_the_unit_allows_the_system_calls_that_are_made(tmp_path: Path) -> None:
    """All doors used, a reload, a drain: the unit's SystemCallFilter would have let every call pass."""
    trace = tmp_path / "trace"
    before = f'set -- {tool("strace")} -D -f -qq -o {trace} "$@"'
    with Sink() as mx, Proxy(before=before) as proxy:
        with Session(proxy.native, SECRET, "server-a") as session:
            session.smtp([mx.endpoint], "a.example", source_ip="127.0.0.11", tls="none").release(wait=True)
        for connect in DOORS.values():
            with connect(proxy, mx.endpoint, "127.0.0.11") as sock:
                assert sock.recv(3) == b"220"
        proxy.hup()
    calls = set(re.findall(r"^\d+ +([a-z0-9_]+)\(", trace.read_text(), re.MULTILINE))
    assert {"accept4", "connect", "epoll_pwait"} & calls
    allowed = allowed_by_filter("@system-service") - allowed_by_filter("@privileged") | allowed_by_filter("@chown")
    assert len(allowed) > 200
    assert calls - allowed == set()


# ---------------------------------------------------------------- scripts, man pages, Makefile


@pytest.mark.parametrize("script", SHELL_SCRIPTS)
def test_shell_scripts_are_clean_and_executable(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    assert run("sh", "-n", script).stderr == ""
    done = run(tool("shellcheck"), "-x", script)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("script", [*MAINTAINER_SCRIPTS, "etc/greenarrow_proxy.bash-completion"])
def test_scripts_that_others_start_are_clean(script: str) -> None:
    done = run(tool("shellcheck"), script)
    assert done.stdout + done.stderr == ""


def completed(*words: str) -> list[str]:
    """What bash offers for the last of these words of a command line."""
    script = """
        . etc/greenarrow_proxy.bash-completion
        greenarrow_proxy() { "$PROGRAM" greenarrow_proxy.py "$@"; }
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)); _greenarrow_proxy; printf '%s\\n' "${COMPREPLY[@]}"
    """
    environ = os.environ | {"PROGRAM": sys.executable}
    done = run("bash", "-c", script, "bash", "greenarrow_proxy", *words, env=environ)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_every_flag() -> None:
    expected = set(re.findall(r"--[a-z0-9-]+", build_parser().format_help()))
    assert len(expected) > 50
    assert set(completed("--")) == expected
    assert completed("--check-c") == ["--check-config"]
    assert "ctl" in completed("")


def test_bash_completes_every_command_of_ctl() -> None:
    words = {command.words for command in COMMANDS} | {("top",)}
    assert set(completed("ctl", "")) == {each[0] for each in words}
    for first in {each[0] for each in words if len(each) > 1}:
        assert set(completed("ctl", first, "")) == {each[1] for each in words if each[0] == first}
    assert completed("ctl", "--because", "a try", "--json", "show", "over") == ["overrides"]
    assert completed("ctl", "--dr") == ["--dry-run"]


def test_bash_completes_files(tmp_path: Path) -> None:
    (tmp_path / "one.conf").touch()
    assert completed("--config-filename", "=", f"{tmp_path}/o") == [f"{tmp_path}/one.conf"]


@pytest.mark.parametrize("page", ["greenarrow_proxy.1", "greenarrow_proxy.conf.5"])
def test_man_pages_are_clean(page: str) -> None:
    done = run(tool("mandoc"), "-T", "lint", "-W", "warning", ROOT / "man" / page)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize(
    "target", ["demo", "test", "check", "bench", "bench-quick", "soak", "deb", "lock", "run", "clean"]
)
def test_make_targets(target: str) -> None:
    done = run(tool("make"), "--dry-run", target)
    assert done.returncode == 0, done.stderr
    assert f"make {target} " in run("make", "help").stdout


def test_an_install_has_every_package() -> None:
    """The tests run from the checkout and would not notice that `pip install` leaves a directory out."""
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "proxy").rglob("*.py")}
    assert [folder for folder in folders if not (ROOT / folder / "__init__.py").exists()] == []


def test_every_path_in_a_document_or_a_docstring_exists() -> None:
    """What was moved or renamed is found by whoever reads of it."""
    texts = [
        file for folder in ("docs", "proxy", "greenarrow_proxy_client", "bench") for file in (ROOT / folder).rglob("*")
    ]
    texts = [file for file in texts if file.suffix in (".md", ".py", ".pyx") and "build" not in file.parts]
    for text in [ROOT / "README.md", ROOT / "CHANGES.md", ROOT / "tests" / "README.md", *texts]:
        for path in re.findall(
            r"(?<![\s`'\"=(:]/)\b(?:proxy|tests|docs|bench|etc|demo)/[\w./-]*\w\.(?:py|pyx|md|sh|conf|json)\b",
            text.read_text(),
        ):
            assert (ROOT / path).exists() or "NAME" in path, f"{text.relative_to(ROOT)} names {path}"


def test_what_make_starts_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for path in re.findall(r"(?:demo|bench|tests|etc)/[\w./]+\.(?:py|sh|conf)", makefile):
        assert (ROOT / path).is_file(), path


def test_continuous_integration_runs_the_test_command_of_the_readme() -> None:
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()
    assert "make test" in (ROOT / "README.md").read_text()


# ---------------------------------------------------------------- the init script


class Service:
    """The init script with paths of its own, as the user who runs the tests."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "greenarrow_proxy.conf"
        self.pidfile = directory / "pid"
        self.log = directory / "log"
        self.daemon = directory / "greenarrow_proxy"
        self.daemon.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/greenarrow_proxy.py "$@"\n')
        self.daemon.chmod(0o755)
        self.configure("127.0.0.1:0")
        defaults = directory / "defaults"
        defaults.write_text(
            f"DAEMON={self.daemon}\nCONFIG={self.config}\nPIDFILE={self.pidfile}\nLOGFILE={self.log}\n"
            "RUN_AS=\nOPEN_FILES=1024\n"
        )
        self.environ = os.environ | {"GREENARROW_PROXY_DEFAULTS": str(defaults)}

    def configure(self, listen: str) -> None:
        self.config.write_text(
            f'listen_socks5 {listen}\nallow_from 127.0.0.1\nauth_shared_secret "{SECRET}"\ndrain_timeout 1s\n'
        )

    def do(self, action: str) -> subprocess.CompletedProcess[str]:
        # `sh`: dash on Debian. A daemon that kept our pipes open would make this wait for it.
        return run("sh", INIT, action, env=self.environ)

    @property
    def pid(self) -> int:
        return int(self.pidfile.read_text())

    def wait_for_log(self, text: str) -> None:
        deadline = time.monotonic() + 20
        while text not in self.log.read_text():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    tool("start-stop-daemon")
    service = Service(tmp_path)
    yield service
    service.do("stop")


def test_init_start_status_reload_restart_stop(service: Service) -> None:
    assert service.do("status").returncode == 3
    started = service.do("start")
    assert (started.returncode, started.stdout) == (0, f"greenarrow_proxy: started (pid {service.pid})\n")
    assert service.do("status").returncode == 0
    first = service.pid
    assert service.do("start").returncode == 0
    assert service.pid == first

    assert service.do("reload").returncode == 0
    service.wait_for_log(" reload: ")
    assert service.pid == first

    assert service.do("restart").returncode == 0
    second = service.pid
    assert second != first
    assert service.do("status").returncode == 0

    stopped = service.do("stop")
    assert (stopped.returncode, stopped.stdout) == (0, "greenarrow_proxy: stopped\n")
    assert service.do("status").returncode == 3
    assert service.do("stop").returncode == 0
    assert service.do("reload").returncode == 7


def test_init_upgrades_without_a_break_and_knows_the_new_process(service: Service) -> None:
    assert service.do("upgrade").returncode == 7
    service.configure("127.0.0.1:0")
    assert service.do("start").returncode == 0
    first = service.pid
    done = service.do("upgrade")
    assert (done.returncode, done.stdout) == (0, f"greenarrow_proxy: upgraded (pid {service.pid})\n")
    second = service.pid
    assert second != first
    assert service.do("status").returncode == 0
    good = service.config.read_text()
    service.config.write_text("listen nonsense\n")
    assert service.do("upgrade").returncode == 6
    assert (service.do("status").returncode, service.pid) == (0, second)
    service.config.write_text(good)
    assert service.do("reload").returncode == 0
    service.wait_for_log(" reload: ")
    assert service.do("stop").stdout == "greenarrow_proxy: stopped\n"


def test_init_refuses_a_bad_configuration(service: Service) -> None:
    service.config.write_text("listen nonsense\n")
    assert service.do("start").returncode == 6
    assert not service.pidfile.exists()
    service.configure("127.0.0.1:0")
    assert service.do("start").returncode == 0
    before = service.log.read_text()
    service.config.write_text("listen nonsense\n")
    done = service.do("reload")
    assert done.returncode == 6
    assert done.stdout.endswith("the old configuration stays in force\n")
    assert service.do("status").returncode == 0
    running = service.pid
    for action in ("restart", "try-restart"):
        done = service.do(action)
        assert (done.returncode, done.stdout) == (6, "greenarrow_proxy: not restarted\n")
        assert (service.do("status").returncode, service.pid) == (0, running)
    assert " reload" not in service.log.read_text().removeprefix(before)


def test_init_reloads_and_restarts_on_its_own_ports_and_not_on_those_of_others(service: Service) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    service.configure(f"127.0.0.1:{port}")
    assert service.do("start").returncode == 0
    assert service.do("reload").returncode == 0
    first = service.pid
    with socket.create_server(("127.0.0.1", 0)) as busy:
        service.configure(f"127.0.0.1:{busy.getsockname()[1]}")
        for action in ("reload", "restart"):
            done = service.do(action)
            assert done.returncode == 6
            assert "is in use, and not by the proxy that shall listen there" in done.stderr
            assert (service.do("status").returncode, service.pid) == (0, first)
    service.configure(f"127.0.0.1:{port}")
    assert service.do("try-restart").returncode == 0
    assert service.pid != first
    service.do("stop")
    assert service.do("try-restart").stdout == "greenarrow_proxy: not running\n"
    assert service.do("status").returncode == 3


def test_init_tells_when_the_program_ends_at_once(service: Service) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        service.configure(f"127.0.0.1:{busy.getsockname()[1]}")
        done = service.do("start")
    assert done.returncode == 1
    assert done.stdout == f"greenarrow_proxy: ended at once; see {service.log}\n"
    assert service.log.read_text() != ""
    assert service.do("status").returncode == 3


def test_init_is_not_fooled_by_the_number_of_another_process(service: Service) -> None:
    service.pidfile.write_text(f"{os.getpid()}\n")
    assert service.do("status").returncode == 1
    assert service.do("stop").returncode == 0  # and we live on
    assert service.do("start").returncode == 0
    os.kill(service.pid, signal.SIGKILL)
    while Path(f"/proc/{service.pid}/cmdline").exists() and Path(f"/proc/{service.pid}/cmdline").read_bytes():
        time.sleep(0.02)
    assert service.do("status").returncode == 1


def test_init_usage() -> None:
    done = run("sh", INIT, "dance")
    assert done.returncode == 2
    assert "start|stop|restart|try-restart|reload|force-reload|upgrade|status" in done.stderr


def test_the_unit_makes_the_directory_of_the_sample_s_control_socket():
    """All else of the file system is read-only there."""
    unit = (ROOT / "etc" / "greenarrow_proxy.service").read_text()
    sample = (ROOT / "etc" / "greenarrow_proxy.conf").read_text()
    (path,) = re.findall(r"^#control_socket (\S+)$", sample, re.MULTILINE)
    (name,) = re.findall(r"^RuntimeDirectory=(\S+)$", unit, re.MULTILINE)
    assert path == f"/run/{name}/control"
