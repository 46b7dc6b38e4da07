"""`--check-config`: what the machine says of well-formed settings."""

import datetime
import os
import resource
import socket

import pytest
import trustme

from proxy.config import load
from proxy.server import check_config

BASE = "listen_socks5 127.0.0.1:0\nallow_from 127.0.0.1\nauth_shared_secret 0123456789abcdef0123456789abcdef\n"


def look(tmp_path, text, **more):
    path = tmp_path / "f.conf"
    path.write_text(BASE + text, encoding="utf-8")
    path.chmod(0o600)
    argv = [f"--config-filename={path}"]

    def read_file(name):
        with open(name, encoding="utf-8") as file:
            return file.read()

    settings = load.load(argv, {}, read_file)
    origins = load.origins(argv, {}, read_file)
    findings = check_config.check(settings, origins, **more)
    errors = [check_config.sentence(f, origins).replace(str(path), "F") for f in findings if f.error]
    warnings = [check_config.sentence(f, origins).replace(str(path), "F") for f in findings if not f.error]
    return errors, warnings


@pytest.fixture(scope="module")
def certificates():
    return trustme.CA()


@pytest.fixture
def pair(tmp_path, certificates):
    """Certificate and key of one server, in two files."""
    issued = certificates.issue_cert("proxy.example", not_after=datetime.datetime(2100, 1, 1))
    certificate, key = tmp_path / "crt", tmp_path / "key"
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    key.chmod(0o600)
    return certificate, key


def test_nothing_to_say(tmp_path):
    assert look(tmp_path, "") == ([], [])


def test_a_secret_from_the_examples_is_no_secret(tmp_path):
    example, other = "0" * 32, "fedcba9876543210fedcba9876543210"
    text = f"instance a {{\n auth_shared_secret {other}, {'1' * 32}\n}}\n"
    errors, warnings = look(tmp_path, f"auth_shared_secret {other}, {example}\n" + text)
    assert errors == []
    assert [line.partition("; ")[0] for line in warnings] == [
        "F:4: warning: auth_shared_secret: a secret that can be guessed",
        "warning: instance: a: a secret that can be guessed",
    ]
    assert example not in "".join(warnings)


def test_a_busy_port_is_left_alone(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        errors, warnings = look(tmp_path, f"listen_proxy_protocol 127.0.0.2:0, 127.0.0.1:{port}\n")
    assert errors == []
    assert warnings == [f"F:4: warning: listen_proxy_protocol: 127.0.0.1:{port} is in use now"]


def test_a_listener_on_a_foreign_address(tmp_path):
    errors, _ = look(tmp_path, "listen_status 127.0.0.2:0\nlisten 127.0.0.3:0\nlisten 192.0.2.1:807\n")
    assert errors == ["F:6: listen: 192.0.2.1:807: Cannot assign requested address"]


def test_a_port_that_this_user_may_not_use(tmp_path, monkeypatch):
    class Forbidden(socket.socket):
        def bind(self, address):
            if 0 < address[1] < 1024:
                raise PermissionError(13, "Permission denied")
            super().bind(address)

    monkeypatch.setattr(socket, "socket", Forbidden)
    (error,), _ = look(tmp_path, "listen 127.0.0.1:807\n")
    assert error.startswith("F:4: listen: 127.0.0.1:807: ports below 1024 need root or CAP_NET_BIND_SERVICE")


def test_certificate_and_key_that_belong_together(tmp_path, pair):
    assert look(tmp_path, f"tls_certificate_file {pair[0]}\ntls_private_key_file {pair[1]}\n") == ([], [])


def test_certificate_and_key_that_do_not(tmp_path, pair, certificates):
    certificates.issue_cert("other.example").private_key_pem.write_to_path(pair[1])
    (error,), _ = look(tmp_path, f"tls_certificate_file {pair[0]}\ntls_private_key_file {pair[1]}\n")
    assert error == f"F:4: tls_certificate_file: {pair[0]} and {pair[1]}: key values mismatch"


@pytest.mark.parametrize(("number", "content"), [(0, ""), (0, "x"), (1, ""), (1, "\0")])
def test_certificate_files_with_something_else_in_them(tmp_path, pair, number, content):
    pair[number].write_text(content)
    (error,), _ = look(tmp_path, f"tls_certificate_file {pair[0]}\ntls_private_key_file {pair[1]}\n")
    assert error.startswith("F:4: tls_certificate_file: ")


def test_certificate_files_that_are_missing(tmp_path, pair):
    pair[1].unlink()
    (error,), _ = look(tmp_path, f"tls_certificate_file {pair[0]}\ntls_private_key_file {pair[1]}\n")
    assert error == f"F:5: tls_private_key_file: {pair[1]}: No such file or directory"


def test_a_key_with_a_password_asks_nobody(tmp_path, pair):
    from cryptography.hazmat.primitives import serialization as form

    key = form.load_pem_private_key(pair[1].read_bytes(), None)
    protected = form.BestAvailableEncryption(b"secret")
    pair[1].write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, protected))
    (error,), _ = look(tmp_path, f"tls_certificate_file {pair[0]}\ntls_private_key_file {pair[1]}\n")
    assert error.startswith("F:4: tls_certificate_file: ")


def test_an_expired_certificate(tmp_path, pair):
    now = datetime.datetime(2100, 1, 2, tzinfo=datetime.UTC)
    text = f"tls_certificate_file {pair[0]}\ntls_private_key_file {pair[1]}\n"
    errors, warnings = look(tmp_path, text, now=now)
    assert errors == []
    assert warnings == [f"F:4: warning: tls_certificate_file: {pair[0]}: expired on 2100-01-01"]


def test_too_few_descriptors(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if limit == resource.RLIM_INFINITY or limit > 10**9:
        pytest.skip("this machine has no limit of open files")
    assert "descriptors" in look(tmp_path, f"max_connections {limit}\n")[1][0]


def test_secrets_that_everybody_can_read(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef" * 2)
    secret.chmod(0o600)
    assert look(tmp_path, f"auth_shared_secret_file {secret}\n") == ([], [])
    secret.chmod(0o644)
    _, (warning,) = look(tmp_path, f"auth_shared_secret_file {secret}\n")
    assert warning == f"F:4: warning: auth_shared_secret_file: {secret} is readable by every user of this machine"


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("source_ip 127.0.0.1, 192.0.2.1\n", "F:4: warning: source_ip: 192.0.2.1 is not an address"),
        ("default_source_ip 192.0.2.1\n", "F:4: warning: default_source_ip: 192.0.2.1 is not an address"),
        ("idle_timeout 9m\n", "F:4: warning: idle_timeout: below the 10 minutes"),
        ("socks5_auth none\n", "F:4: warning: socks5_auth: none"),
        ("listen_tls no\nlisten 0.0.0.0:0\n", "F:4: warning: listen_tls: no"),
        ("allow_destination 127.0.0.0/8\n", "F:4: warning: allow_destination: loopback"),
        ("throttle a {\n}\n", "warning: throttle: a: no limit"),
        ("instance a {\n allow_from 127.0.0.2\n}\n", "warning: instance: a: its allow_from goes beyond"),
        (
            "listen_proxy_protocol 127.0.0.2:0\nlisten_proxy_protocol_allow_from ::/0\n",
            "F:4: warning: listen_proxy_protocol: everybody",
        ),
    ],
)
def test_advice(tmp_path, text, warning):
    errors, warnings = look(tmp_path, text)
    assert errors == []
    assert len(warnings) == 1
    assert warnings[0].startswith(warning)


@pytest.mark.parametrize(
    "text",
    [
        "source_ip 127.0.0.0/8, 192.0.2.0/24\ndefault_source_ip same\n",
        "listen_tls no\nlisten 127.0.0.2:0\n",
        "idle_timeout 10m\n",
        "instance a {\n allow_from 127.0.0.1\n source_ip 10.0.0.0/8\n}\n",
        "throttle a {\n max_delivery_rate 1/hr\n}\n",
    ],
)
def test_no_advice(tmp_path, text):
    assert look(tmp_path, text) == ([], [])


def test_it_changes_nothing(tmp_path):
    before = set(os.listdir("/proc/self/fd"))
    look(tmp_path, "listen 127.0.0.2:0\n")
    assert set(os.listdir("/proc/self/fd")) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["f.conf"]
