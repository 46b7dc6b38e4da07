"""The .deb on real Debians, with their own dpkg, apt and systemd: installed by the documented commands, reloaded,
upgraded, purged; and the unit, which only a real systemd can judge."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import forms
from tests.clients import socks5
from tests.debian import Machine, copy_of, run_in, tree
from tests.e2e.install import mail
from tests.e2e.install.conftest import BUILDER, EPOCH, FRESH, made
from tests.peers import program
from tests.sinks import Raw
from tests.waiting import wait_for

pytestmark = [pytest.mark.either_form("it is the package that is asked which form it has"), pytest.mark.timeout(900)]

CONFIG = "/etc/greenarrow_proxy/greenarrow_proxy.conf"
SUITES = {"12": "bookworm", "13": "trixie"}


def here() -> str:
    """The number of this Debian."""
    return re.findall(r'^VERSION_ID="?(\w+)', Path("/etc/os-release").read_text(), re.MULTILINE)[0]


def build(version: str, out: Path, checkout: Path) -> Path:
    """The package for this Debian, built on one; another one's has all of the core."""
    out.mkdir(exist_ok=True)
    if version == here():
        program("dh")
        made("deb", out)
    else:
        with copy_of(tree(SUITES[version], *BUILDER)) as root:
            shutil.copytree(checkout, root / "src", symlinks=True)
            environ = {"SOURCE_DATE_EPOCH": EPOCH} | forms.UNOPTIMISED
            words = [f"{name}={value}" for name, value in environ.items()]
            command = ["env", *words, "/src/packaging/build_deb.sh", "/out"]
            run_in(root, *command, binds={out: "/out"}, timeout=600)
    (package,) = out.glob("*.deb")
    return package


def lower_version(package: Path, scratch: Path, number: str) -> Path:
    """The same package as an earlier version, which had a module more and another sample configuration."""
    content = scratch / "content"
    subprocess.run(["dpkg-deb", "-R", package, content], check=True, timeout=60)
    control = content / "DEBIAN" / "control"
    control.write_text(re.sub(r"^Version: .*$", f"Version: {number}", control.read_text(), flags=re.MULTILINE))
    (module,) = content.glob("usr/lib/greenarrow-proxy/lib/python3.*/site-packages/proxy/__init__.py")
    module.write_text(re.sub(r'__version__ = ".*"', '__version__ = "0.0.1"', module.read_text()))
    (module.parent / "gone.py").write_text('"""Was there in 0.0.1 only."""\n')
    sample = content / "etc/greenarrow_proxy/throttles/gmx.conf"
    sample.write_text("# as it was\n" + sample.read_text())
    earlier = scratch / f"greenarrow-proxy_{number}_amd64.deb"
    command = ["dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "-b", content, earlier]
    subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)
    shutil.rmtree(content)
    return earlier


@pytest.fixture(scope="class")
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Path:
    version = request.cls.version
    return build(version, tmp_path_factory.mktemp("deb") / version, checkout)


@pytest.fixture(scope="class")
def place() -> mail.Place:
    return mail.place()


@pytest.fixture(scope="class")
def machine(request: pytest.FixtureRequest, package: Path, place: mail.Place) -> Iterator[Machine]:
    """A fresh one on which the three documented commands were typed."""
    with Machine(tree(SUITES[request.cls.version], *FRESH)) as machine:
        machine.put(package)
        text = mail.commands("Debian package").replace("greenarrow-proxy_0.1.0-1~deb12_amd64.deb", package.name)
        assert package.name in text
        machine.sh("cd /root; " + place.fill_in(text))
        yield machine


def echo_lines(sock: socket.socket) -> None:
    while line := sock.recv(100):
        sock.sendall(line)


class Deb:
    """The same for each Debian."""

    version: str

    # -- the package

    def test_lintian_has_nothing_to_say(self, package: Path) -> None:
        done = subprocess.run(
            [program("lintian"), "--allow-root", "--info", "--fail-on=warning", package],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, ""), done.stdout

    def test_no_path_of_the_build_is_left_in_it(self, package: Path, tmp_path: Path) -> None:
        subprocess.run(["dpkg-deb", "-x", package, tmp_path], check=True, timeout=60)
        found = subprocess.run(
            ["grep", "-r", "-l", "-E", "/tmp/tmp|/build/env|greenarrow-proxy/debian/", tmp_path],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        ).stdout
        assert found == ""

    def test_it_holds_what_is_documented(self, package: Path) -> None:
        listed = subprocess.run(["dpkg-deb", "-c", package], capture_output=True, text=True, timeout=60, check=True)
        names = {
            line.split()[5].removeprefix(".").removeprefix("/usr/lib/systemd") for line in listed.stdout.splitlines()
        }
        names = {name.removeprefix("/lib/systemd") for name in names}
        assert {
            "/etc/greenarrow_proxy/greenarrow_proxy.conf",
            "/etc/greenarrow_proxy/throttles/gmail.conf",
            "/etc/init.d/greenarrow_proxy",
            "/etc/logrotate.d/greenarrow_proxy",
            "/system/greenarrow_proxy.service",
            "/system/greenarrow_proxy.socket",
            "/usr/bin/greenarrow_proxy",
            "/usr/lib/tmpfiles.d/greenarrow_proxy.conf",
            "/usr/share/bash-completion/completions/greenarrow_proxy",
            "/usr/share/doc/greenarrow-proxy/examples/clients/exim.conf",
            "/usr/share/man/man1/greenarrow_proxy.1.gz",
            "/usr/share/man/man5/greenarrow_proxy.conf.5.gz",
        } <= names
        assert ("/system/greenarrow_proxy.service.d/10-pauses.conf" in names) == (self.version != "12")
        assert not [name for name in names if name.endswith(".pyc") or "/tests/" in name]

    # -- the machine on which it was installed

    def test_three_commands_and_mail_of_two_mtas(self, machine: Machine, place: mail.Place) -> None:
        mail.by_two_mtas(place, mail.secret_of((machine.root / CONFIG[1:]).read_text()))

    def test_it_is_what_it_should_be(self, machine: Machine) -> None:
        assert "(relay: compiled, core: compiled)" in machine.run("greenarrow_proxy", "--version").stdout
        assert machine.run("stat", "-c", "%U:%G %a", CONFIG).stdout == "root:greenarrow-proxy 640\n"
        pid = machine.show("greenarrow_proxy", "MainPID")
        status = machine.run("cat", f"/proc/{pid}/status").stdout
        assert re.search(r"^CapEff:\t0+400$", status, re.MULTILINE)  # the right to low ports
        assert machine.run("stat", "-c", "%U", f"/proc/{pid}").stdout == "greenarrow-proxy\n"
        assert machine.run("systemctl", "is-enabled", "greenarrow_proxy").stdout == "enabled\n"
        compiled = machine.run("sh", "-c", "ls /usr/lib/greenarrow-proxy/lib/*/site-packages/proxy/__pycache__").stdout
        assert "cli.cpython" in compiled
        done = machine.run("systemd-analyze", "verify", "--man=no", "greenarrow_proxy.service")
        assert done.stderr == ""

    def test_a_check_by_root_judges_for_the_service(self, machine: Machine) -> None:
        """Port 807 is the service's to use; the secret is not everybody's to read."""
        check = ("greenarrow_proxy", "--check-config", f"--config-filename={CONFIG}")
        done = machine.run(*check)
        assert "the configuration is good (checked as user greenarrow-proxy)" in done.stdout
        assert "need root or CAP_NET_BIND_SERVICE" not in done.stderr
        assert "Permission denied" in machine.run(*check, "--user=nobody", fails=True).stderr
        secret = machine.root / "root" / "secret"
        secret.write_text("0123456789abcdef-0123456789abcdef")
        secret.chmod(0o600)
        done = machine.run(*check, "--auth-shared-secret-file=/root/secret", fails=True)
        assert "/root/secret: Permission denied (checked as user greenarrow-proxy)" in done.stderr

    def test_pauses_between_two_tries_grow_where_systemd_can(self, machine: Machine) -> None:
        assert machine.show("greenarrow_proxy", "StartLimitIntervalUSec") == "0"
        assert machine.show("greenarrow_proxy", "RestartUSec") == "2s"
        if self.version != "12":
            assert machine.show("greenarrow_proxy", "RestartSteps") == "8"
            assert machine.show("greenarrow_proxy", "RestartMaxDelayUSec") == "1min"

    def test_bash_completes_flags_and_commands(self, machine: Machine) -> None:
        script = """
            . /usr/share/bash-completion/completions/greenarrow_proxy
            COMP_WORDS=(greenarrow_proxy --check) COMP_CWORD=1; _greenarrow_proxy; echo "${COMPREPLY[*]}"
            COMP_WORDS=(greenarrow_proxy ctl show th) COMP_CWORD=3; _greenarrow_proxy; echo "${COMPREPLY[*]}"
        """
        assert machine.sh(script) == "--check-config\nthrottles\n"

    def test_metrics_of_the_process(self, machine: Machine, place: mail.Place) -> None:
        """They are read from /proc, of which the unit hides most."""
        with configured(machine, place, f"listen_status {place.door}:809\nlisten_status_allow_from 127.0.0.0/8\n"):
            with urllib.request.urlopen(f"http://{place.door}:809/metrics", timeout=30) as answer:
                text = answer.read().decode()
            found = dict(re.findall(r"^(process_\w+) (\S+)$", text, re.MULTILINE))
            for name in ("cpu_seconds_total", "open_fds", "resident_memory_bytes", "start_time_seconds", "max_fds"):
                assert float(found[f"process_{name}"]) > 0, name

    def test_the_control_sockets_group(self, machine: Machine, place: mail.Place) -> None:
        """As it is documented: the proxy's user is in that group; no change of the unit."""
        machine.sh("addgroup --quiet --system postmasters; adduser --quiet greenarrow-proxy postmasters")
        machine.sh("adduser --quiet --disabled-password --gecos '' alice; adduser --quiet alice postmasters")
        machine.run("systemctl", "restart", "greenarrow_proxy")
        socket_file = "/run/greenarrow_proxy/control"
        with configured(machine, place, f"control_socket {socket_file}\ncontrol_group postmasters\n"):
            assert machine.run("stat", "-c", "%U:%G %a", socket_file).stdout == "greenarrow-proxy:postmasters 660\n"
            ctl = ("greenarrow_proxy", "ctl", "--socket", socket_file)
            alice = ("setpriv", "--reuid=alice", "--regid=alice", "--init-groups", "--")
            nobody = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--")
            assert "in force" in machine.run(*alice, *ctl, "reload").stdout
            assert json.loads(machine.run(*ctl, "--json", "show", "listeners").stdout)
            machine.run(*nobody, *ctl, "show", "status", fails=True)

    def test_a_reload_with_a_mistake_fails_and_changes_nothing(self, machine: Machine, place: mail.Place) -> None:
        before = machine.show("greenarrow_proxy", "MainPID")
        with configured(machine, place, "connect_timeout nonsense\n", fails=True):
            why = machine.journal("greenarrow_proxy")
            assert f"{CONFIG}:" in why
            assert "connect_timeout" in why
            shown = machine.run("systemctl", "status", "--no-pager", "greenarrow_proxy").stdout
            assert "connect_timeout" in shown  # what one looks at first
            assert " reload" not in why.rpartition("connect_timeout")[2].replace("reload for", "")
        assert machine.show("greenarrow_proxy", "ActiveState") == "active"
        assert machine.show("greenarrow_proxy", "MainPID") == before
        mail.by_two_mtas(place, mail.secret_of((machine.root / CONFIG[1:]).read_text()))

    def test_a_reload_fails_on_a_file_that_only_root_can_read(self, machine: Machine, place: mail.Place) -> None:
        secret = machine.root / "etc" / "greenarrow_proxy" / "secret"
        secret.write_text("0123456789abcdef-0123456789abcdef")
        secret.chmod(0o600)
        with configured(machine, place, "auth_shared_secret_file /etc/greenarrow_proxy/secret\n", fails=True):
            assert "/etc/greenarrow_proxy/secret: Permission denied" in machine.journal("greenarrow_proxy")
        secret.unlink()

    def test_a_reload_fails_on_a_port_of_another_program(self, machine: Machine, place: mail.Place) -> None:
        with socket.create_server((place.door, 0)) as busy:
            taken = f"{place.door}:{busy.getsockname()[1]}"
            with configured(machine, place, f"listen_proxy_protocol {taken}\n", fails=True):
                assert f"{taken} is in use, and not by the proxy" in machine.journal("greenarrow_proxy")

    def test_a_start_waits_through_the_night_for_its_port(self, machine: Machine, place: mail.Place) -> None:
        """More tries than the five after which systemd gives a unit up, if they come in ten seconds."""
        machine.run("systemctl", "stop", "greenarrow_proxy")
        quick = machine.root / "run/systemd/system/greenarrow_proxy.service.d/quick.conf"
        quick.parent.mkdir(parents=True)
        quick.write_text(
            "[Service]\nRestartSec=100ms\n" + ("RestartMaxDelaySec=200ms\n" if self.version != "12" else "")
        )
        machine.run("systemctl", "daemon-reload")
        with socket.create_server((place.door, 807)):
            machine.run("systemctl", "start", "--no-block", "greenarrow_proxy")
            wait_for(lambda: int(machine.show("greenarrow_proxy", "NRestarts")) > 5, 300, "six tries")
            assert machine.show("greenarrow_proxy", "ActiveState") == "activating"
        wait_for(lambda: machine.show("greenarrow_proxy", "ActiveState") == "active", 120, "it has its port")
        quick.unlink()
        machine.run("systemctl", "daemon-reload")
        mail.by_two_mtas(place, mail.secret_of((machine.root / CONFIG[1:]).read_text()))

    def test_an_address_that_comes_late_is_waited_for_by_the_listener(
        self, machine: Machine, place: mail.Place
    ) -> None:
        """The start does not fail on it."""
        with configured(machine, place, "listen_proxy_protocol 192.0.2.77:808\n"):
            machine.run("systemctl", "restart", "greenarrow_proxy")
            assert machine.show("greenarrow_proxy", "ActiveState") == "active"

    def test_a_new_process_takes_over_by_sigusr2(self, machine: Machine, place: mail.Place) -> None:
        """systemd learns who is the main one now; whoever was connected stays so."""
        old = machine.show("greenarrow_proxy", "MainPID")
        with socket.create_connection((place.door, 1080), 30) as client:
            client.sendall(b"\x05\x01\x02")
            assert client.recv(2) == b"\x05\x02"
            machine.run("systemctl", "kill", "--signal=USR2", "--kill-whom=main", "greenarrow_proxy")
            wait_for(lambda: machine.show("greenarrow_proxy", "MainPID") != old, 120, "another main process")
            mail.by_two_mtas(place, mail.secret_of((machine.root / CONFIG[1:]).read_text()))
        wait_for(
            lambda: machine.run("sh", "-c", f"test -e /proc/{old} || echo gone").stdout == "gone\n",
            60,
            "the old process has ended",
        )
        assert machine.show("greenarrow_proxy", "ActiveState") == "active"
        assert machine.show("greenarrow_proxy", "NRestarts") == "0"
        mail.by_two_mtas(place, mail.secret_of((machine.root / CONFIG[1:]).read_text()))

    # -- from version to version, and away (last: they change the machine for good)

    def test_upgrade_by_apt(self, machine: Machine, package: Path, place: mail.Place, tmp_path: Path) -> None:
        configuration = (machine.root / CONFIG[1:]).read_text()
        earlier = lower_version(package, tmp_path, f"0.0.1-1~deb{self.version}")
        machine.put(earlier)
        machine.sh(f"apt-get install --yes --allow-downgrades /root/{earlier.name}")
        assert machine.run("greenarrow_proxy", "--version").stdout.startswith("greenarrow_proxy 0.0.1 ")
        old = machine.show("greenarrow_proxy", "MainPID")
        assert self._running_version(machine, place) == "0.0.1"

        repository = machine.root / "srv" / "repository"
        repository.mkdir(parents=True)
        shutil.copy(package, repository)
        index = subprocess.run(
            ["dpkg-scanpackages", "."], cwd=repository, capture_output=True, text=True, check=True, timeout=60
        ).stdout
        (repository / "Packages").write_text(index)
        (machine.root / "root" / "only.list").write_text("deb [trusted=yes] file:/srv/repository ./\n")
        only = "-o Dir::Etc::sourcelist=/root/only.list -o Dir::Etc::sourceparts=-"
        with (  # the new version takes over, and nobody is cut off
            Raw(echo_lines) as mx,
            socks5((place.door, 1080), mx.endpoint, password=mail.secret_of(configuration)) as client,
        ):
            machine.sh(f"apt-get {only} update && apt-get {only} --yes upgrade")
            assert "upgrade: the new program has taken over" in machine.journal("greenarrow_proxy")
            client.sendall(b"still here\r\n")
            assert client.recv(100) == b"still here\r\n"

        assert machine.run("dpkg-query", "-W", "-f", "${Version}", "greenarrow-proxy").stdout == self._version(package)
        assert self._running_version(machine, place) != "0.0.1"
        assert machine.show("greenarrow_proxy", "MainPID") != old
        assert (machine.root / CONFIG[1:]).read_text() == configuration
        assert machine.run("stat", "-c", "%U:%G %a", CONFIG).stdout == "root:greenarrow-proxy 640\n"
        assert "as it was" not in (machine.root / "etc/greenarrow_proxy/throttles/gmx.conf").read_text()
        assert not list(machine.root.glob("usr/lib/greenarrow-proxy/lib/*/site-packages/proxy/**/gone*"))
        mail.by_two_mtas(place, mail.secret_of(configuration))

    def test_an_upgrade_leaves_the_old_version_running_where_the_new_one_refuses_the_configuration(
        self, machine: Machine, package: Path, place: mail.Place
    ) -> None:
        path = machine.root / CONFIG[1:]
        good = path.read_text()
        running = machine.show("greenarrow_proxy", "MainPID")
        path.write_text(good + "a_directive_of_the_old_version yes\n")
        done = machine.run("apt-get", "install", "--yes", "--reinstall", f"/root/{package.name}")
        assert "the old version goes on running" in done.stdout + done.stderr
        assert machine.show("greenarrow_proxy", "MainPID") == running
        path.write_text(good)
        mail.by_two_mtas(place, mail.secret_of(good))

    def test_removed_and_purged(self, machine: Machine, package: Path, place: mail.Place) -> None:
        machine.run("apt-get", "remove", "--yes", "greenarrow-proxy")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((place.door, 807), 30).close()
        assert (machine.root / CONFIG[1:]).exists()
        assert not (machine.root / "usr/lib/greenarrow-proxy").exists()

        machine.run("apt-get", "install", "--yes", f"/root/{package.name}")
        assert machine.run("systemctl", "is-enabled", "greenarrow_proxy").stdout == "enabled\n"  # as it was
        machine.run("systemctl", "start", "greenarrow_proxy")
        mail.by_two_mtas(place, mail.secret_of((machine.root / CONFIG[1:]).read_text()))

        machine.run("apt-get", "purge", "--yes", "greenarrow-proxy")
        left = machine.run("find", "/etc", "/usr", "/lib", "/run", "/var/log", "-iname", "*greenarrow*").stdout.split()
        assert [path for path in left if "/share/doc" not in path] == []
        machine.run("getent", "passwd", "greenarrow-proxy")  # its files may be somewhere

    # -- inside

    def _running_version(self, machine: Machine, place: mail.Place) -> str:
        """Of the process, whatever lies on the disk."""
        started = re.findall(r"^start: greenarrow_proxy (\S+)", machine.journal("greenarrow_proxy"), re.MULTILINE)
        return str(started[-1])

    def _version(self, package: Path) -> str:
        return subprocess.run(
            ["dpkg-deb", "-f", package, "Version"], capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()


class configured:
    """The configuration with more lines, put in force by `systemctl reload`; afterwards as it was.

    Args:
        fails: the reload must fail.
    """

    def __init__(self, machine: Machine, place: mail.Place, more: str, fails: bool = False) -> None:
        self._machine, self._more, self._fails = machine, more, fails
        self._path = machine.root / CONFIG[1:]

    def __enter__(self) -> None:
        self._before = self._path.read_text()
        self._path.write_text(self._before + self._more)
        self._reload(self._fails)

    def __exit__(self, *_: object) -> None:
        self._path.write_text(self._before)
        self._reload(False)

    def _reload(self, fails: bool) -> None:
        seen = len(self._reloads())
        self._machine.run("systemctl", "reload", "greenarrow_proxy", fails=fails)
        if not fails:  # the signal is sent, and then it takes a moment
            wait_for(lambda: len(self._reloads()) > seen, 30, "the log says that it has reloaded")

    def _reloads(self) -> list[str]:
        return re.findall(r"^reload: .*$", self._machine.journal("greenarrow_proxy"), re.MULTILINE)


class TestDebian12(Deb):
    version = "12"

    def test_two_builds_are_equal(self, package: Path, checkout: Path, tmp_path: Path) -> None:
        """Another place, another umask, another time zone, no git."""
        place = {"TZ": "Asia/Tokyo", "LC_ALL": "C", "TMPDIR": str(tmp_path)}
        environ = forms.build_environ(SOURCE_DATE_EPOCH=EPOCH, **forms.A_FEW, **place)
        script = f"umask 077; {checkout}/packaging/build_deb.sh {tmp_path}/out"
        subprocess.run(["sh", "-euc", script], check=True, timeout=600, stdout=subprocess.DEVNULL, env=environ)
        (again,) = (tmp_path / "out").glob("*.deb")
        assert again.name == package.name
        digests = [hashlib.sha256(each.read_bytes()).hexdigest() for each in (again, package)]
        assert digests[0] == digests[1]


class TestDebian13(Deb):
    version = "13"
