"""The program as a user calls it: exit codes, what is printed where, and no secret and no traceback in any of it."""

import fcntl
import os
import pty
import socket
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from proxy import __version__, form
from proxy.net.relay import engine_name
from tests import forms

ROOT = Path(__file__).parents[3]
SECRET = "Tr0ub4dor-Tr0ub4dor-Tr0ub4dor-Tr0ub4dor"
BASE = f'listen_socks5 127.0.0.1:0\nallow_from 127.0.0.1\nauth_shared_secret "{SECRET}"\n'


def run(*arguments, **more):
    """Runs the program to its end and returns (exit code, stdout, stderr)."""
    environ = forms.environ()
    environ |= more.pop("environ", {})
    command = [sys.executable, str(ROOT / "greenarrow_proxy.py"), *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
    done = subprocess.run(command, **streams, env=environ, stdin=subprocess.DEVNULL, check=False, timeout=60)
    out, err = (stream.decode() if stream is not None else "" for stream in (done.stdout, done.stderr))
    assert "Traceback" not in out + err
    assert SECRET not in out + err
    return done.returncode, out, err


@pytest.fixture
def conf(tmp_path):
    """Writes a configuration file and returns the flag that names it."""

    def write(text, name="f.conf"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(0o600)
        return f"--config-filename={path}"

    return write


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(flag):
    code, out, err = run(flag)
    assert (code, err) == (0, "")
    assert out.startswith("usage: greenarrow_proxy")
    assert "--auth-shared-secret-file FILE" in out


def test_help_shows_nothing_of_the_environment_or_the_file(conf):
    code, out, _ = run("--help", conf(BASE), environ={"GREENARROW_PROXY_AUTH_SHARED_SECRET": SECRET})
    assert code == 0
    assert "127.0.0.1:0" not in out


def test_version():
    code, out, err = run("--version")
    assert (code, err) == (0, "")
    assert out == f"greenarrow_proxy {__version__} (relay: {engine_name()}, core: {form.core_name()})\n"


def test_help_needs_no_gevent(tmp_path):
    (tmp_path / "gevent.py").write_text("raise ImportError('not needed for this')")
    assert run("--help", environ={"PYTHONPATH": str(tmp_path)})[0] == 0


@pytest.mark.parametrize("flag", ["--nonsense", "--listen", "stray", f"--auth-shared-secrets={SECRET}", SECRET, "-x"])
def test_a_wrong_command_line_is_exit_64(flag):
    code, out, err = run(flag)
    assert (code, out) == (64, "")
    assert err.startswith("greenarrow_proxy: ")
    assert err.endswith("See greenarrow_proxy --help.\n")


def test_check_config_of_a_good_file(conf):
    flag = conf(BASE)
    path = flag.partition("=")[2]
    assert run("--check-config", flag) == (0, f"{path}: the configuration is good\n", "")


def test_check_config_of_the_documented_sample():
    """Good as soon as it has a secret of its own."""
    sample = f"--config-filename={ROOT / 'etc/greenarrow_proxy.conf'}"
    code, out, err = run("--check-config", sample, "--listen=[::1]:0")
    assert (code, out) == (78, "")
    assert "auth_shared_secret: it stands in documents, so everybody knows it; `openssl rand -hex 32` makes" in err
    code, out, _ = run("--check-config", sample, "--listen=[::1]:0", f"--auth-shared-secret={SECRET}")
    assert code == 0
    assert "the configuration is good" in out


def test_check_config_of_all_limits_for_large_providers(conf):
    """They go together, and there is nothing to say of any; what they count is told."""
    smtp = "mode smtp\nsource mail1 {\n ip 127.0.0.1\n ehlo mail1.example.com\n}\n"
    flag = conf(BASE + smtp + f"include {ROOT}/etc/throttles/*.conf\n")
    path = flag.partition("=")[2]
    assert run("--check-config", flag) == (
        0,
        f"{path}: the configuration is good\n"
        "throttles comcast, comcast_ipv6, gmail, gmx, icloud, orange, outlook, microsoft365 and 1 more count\n"
        "  at listen_socks5 127.0.0.1:0: messages (mode smtp)\n"
        "throttle every_receiver counts\n"
        "  connections, at every listener\n",
        "",
    )


def test_check_config_tells_every_mistake_with_its_line(conf):
    flag = conf(BASE + f"lissten 1\nlog_verbose maybe\nauth_shared_secret {SECRET}`\n")
    path = flag.partition("=")[2]
    code, out, err = run("--check-config", flag)
    assert (code, out) == (78, "")
    assert [line.partition(": ")[0] for line in err.splitlines()] == [f"{path}:{number}" for number in (4, 5, 6)]


def test_check_config_looks_at_the_machine(conf):
    code, _, err = run("--check-config", conf(BASE + "listen 198.51.100.1:807\n"))
    assert code == 0
    assert ":4: warning: listen: 198.51.100.1:807 is not an address of this machine" in err


def test_check_config_as_the_services_user(conf, tmp_path):
    """Root can read everything, the service cannot."""
    if os.geteuid():
        pytest.skip("only root can check as another user")
    secret = tmp_path / "secret"
    secret.write_text("drawn-at-random-by-the-operator-1")
    secret.chmod(0o600)
    path = Path(conf(BASE + f"auth_shared_secret_file {secret}\n").partition("=")[2])
    path.chmod(0o644)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    assert run("--check-config", f"--config-filename={path}")[0] == 0
    code, out, err = run("--check-config", "--user=nobody", f"--config-filename={path}")
    assert (code, out) == (78, "")
    assert f"{path}:4: auth_shared_secret_file: {secret}: Permission denied (checked as user nobody)" in err
    secret.chmod(0o644)
    code, out, err = run("--check-config", "--user=nobody", f"--config-filename={path}", "--listen=127.0.0.1:807")
    assert code == 0
    assert "the configuration is good (checked as user nobody)" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--check-config", "--user=no-such-user"), "there is no user no-such-user on this machine"),
        (("--user=root",), "--user: only with --check-config"),
        (("--ping-instance=a",), "--ping-instance: only with --ping"),
        (("--ping=127.0.0.1:1", "--status"), "--ping and --status: one at a time"),
        (("--check-config", "--status=127.0.0.1:1"), "--check-config and --status: one at a time"),
    ],
)
def test_flags_that_do_not_go_together(conf, flags, words):
    code, out, err = run(conf(BASE), *flags)
    assert (code, out) == (64, "")
    assert words in err


@pytest.mark.parametrize("address", ["localhost:{}", ":{}", "{}", "127.0.0.1:{}"])
def test_the_ways_to_say_a_port_of_this_machine(address):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code, _, err = run("--status=" + address.format(port))
    assert code == 69
    assert err.startswith(f"greenarrow_proxy: 127.0.0.1:{port}: ")


def test_check_config_leaves_a_busy_port_alone(conf):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        code, _, err = run("--check-config", conf(BASE), f"--listen-socks5=127.0.0.1:{busy.getsockname()[1]}")
    assert code == 0
    assert "command line: warning: listen_socks5: " in err


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"listen \xff\n",
        b"\x00" * 5000,
        b"\xff\xfel\x00i\x00s\x00t\x00e\x00n\x00",
        b"throttle a {\n",
        b'listen "',
        b"a {\n" * 2000,
        b"a\n" * 20000,
        b"x" * 5_000_000,
        b"auth_shared_secret " + SECRET.encode() + b"\x00\n",
        b"auth_shared_secret\n" + SECRET.encode() + b"\n",
    ],
    ids=["empty", "latin", "zeros", "utf16", "block", "quote", "blocks", "many", "long", "nul", "slid"],
)
def test_a_broken_file_is_exit_78(conf, text):
    code, out, err = run(conf(text))
    assert (code, out) == (78, "")
    assert err


def test_a_key_with_a_password_is_a_mistake_and_no_question(conf, tmp_path):
    """OpenSSL by itself would ask on the terminal, so the program gets one."""
    issued = trustme.CA().issue_cert("proxy.example")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "crt")
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    protection = serialization.BestAvailableEncryption(b"password")
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
    (tmp_path / "key").write_bytes(key.private_bytes(*form))
    text = BASE + f"tls_certificate_file {tmp_path}/crt\ntls_private_key_file {tmp_path}/key\n"
    text += "listen 127.0.0.2:0\n"
    master, terminal = pty.openpty()
    try:
        code, _, err = run(
            "--check-config",
            conf(text),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(terminal, termios.TIOCSCTTY, 0),
        )
        os.set_blocking(master, False)
        with pytest.raises(BlockingIOError):
            os.read(master, 100)
    finally:
        os.close(master)
        os.close(terminal)
    assert code == 78
    assert ":5: tls_private_key_file: " in err
    start = run(conf(text))
    assert start[0] == 78
    assert start[2].splitlines()[0] == err.splitlines()[0]  # the same words


def test_a_crlf_file_with_a_byte_order_mark(conf):
    text = b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode()
    assert run("--check-config", conf(text))[0] == 0


@pytest.mark.parametrize("path", ["/nowhere/f.conf", "/", "/dev/zero", "", "a\nb", "\udcff"])
def test_a_file_that_cannot_be_read_is_exit_78(path):
    code, out, err = run(f"--config-filename={path}")
    assert (code, out) == (78, "")
    assert err


def test_an_unreadable_secret_file(conf):
    code, _, err = run("--check-config", conf(BASE + "auth_shared_secret_file /nowhere/secret\n"))
    assert code == 78
    assert ":4: auth_shared_secret_file: /nowhere/secret: No such file or directory" in err


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_a_reader_that_went_away_or_a_full_disk(flag):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as gone, open("/dev/full", "wb") as full:
        assert run(flag, stdout=gone)[2] == ""
        assert run(flag, stdout=full)[2] == ""


def test_a_name_that_the_terminal_cannot_write(conf):
    code, out, _ = run("--check-config", conf(BASE, "é.conf"), environ={"PYTHONIOENCODING": "ascii"})
    assert code == 0
    assert "\\xe9.conf" in out


def test_an_address_that_is_taken_is_exit_69(conf):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        code, out, err = run(conf(BASE), f"--listen-socks5=127.0.0.1:{port}")
    assert code == 69
    assert f"127.0.0.1:{port}" in out + err


def test_an_internal_error_is_one_line_without_what_it_was_about(conf, tmp_path):
    """A standard module that fails stands in for a mistake of ours."""
    (tmp_path / "resource.py").write_text(f"raise RuntimeError({SECRET!r})")
    code, _, err = run("--check-config", conf(BASE), environ={"PYTHONPATH": str(tmp_path)})
    assert code == 70
    assert err == "greenarrow_proxy: internal error, please report: RuntimeError at resource.py:1\n"


def test_what_is_loaded_is_not_looked_at_for_garbage(conf):
    """It was a fifth of the processor time of a start."""
    script = """
import gc, sys
from proxy import cli
loading = []
def looks(phase, info):
    if "proxy.server.server" in sys.modules and "proxy.server.succession" not in sys.modules:
        loading.append(phase)
gc.callbacks.append(looks)
code = cli.main(sys.argv[1:])
print(code, loading, gc.isenabled(), "proxy.server.succession" in sys.modules)
"""
    with socket.create_server(("127.0.0.1", 0)) as busy:
        flags = [conf(BASE), f"--listen-socks5=127.0.0.1:{busy.getsockname()[1]}"]
        command = [sys.executable, "-c", script, *flags]
        done = subprocess.run(command, cwd=ROOT, env=forms.environ(), capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "69 [] True True", done.stdout + done.stderr
