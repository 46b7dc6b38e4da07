"""`--check-config`: what the machine says of well-formed settings."""

import datetime
import glob
import os
import resource
import socket
import subprocess
import sys

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from proxy.config import load
from proxy.config.values import Kind
from proxy.server import check_config, findings

BASE = "listen_socks5 127.0.0.1:0\nallow_from 127.0.0.1\nauth_shared_secret 0123456789abcdef0123456789abcdef\n"


def look(tmp_path, text, environ=None, **more):
    path = tmp_path / "f.conf"
    path.write_text(BASE + text, encoding="utf-8")
    path.chmod(0o600)
    argv = [f"--config-filename={path}"]

    def read_file(name):
        with open(name, encoding="utf-8") as file:
            return file.read()

    loaded = load.load(argv, environ or {}, read_file, find=glob.glob)
    found = check_config.check(loaded, **more)
    lines = [line.replace(str(path), "F") for line in findings.sentences(found, loaded.origins)]
    return [line for line in lines if "warning: " not in line], [line for line in lines if "warning: " in line]


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


def test_a_secret_that_was_not_drawn_at_random(tmp_path):
    guessable, other = "ab" * 16, "fedcba9876543210fedcba9876543210"
    text = f"instance a {{\n auth_shared_secret {other}, {guessable}\n}}\n"
    errors, warnings = look(tmp_path, f"auth_shared_secret {guessable}\nauth_shared_secret {other}\n" + text)
    assert errors == []
    assert [line.partition("; ")[0] for line in warnings] == [
        "F:4: warning: auth_shared_secret: a secret that can be guessed",
        "F:6: warning: instance: a: a secret that can be guessed",
    ]
    assert guessable not in "".join(warnings)


@pytest.mark.parametrize(
    "secret",
    [
        '"0123456789abcdef0123456789abcdef"',
        "'0123456789abcdef0123456789abcdef'",
        "\u201c0123456789abcdef0123456789abcdef\u201d",
        "0123456789abcdef 0123456789abcdef",
        "auth_shared_secret 0123456789abcdef0123456789abcdef",
        "auth_shared_secret=0123456789abcdef0123456789abcdef",
    ],
)
def test_a_secret_that_was_quoted_for_another_place(tmp_path, secret):
    """In a secret file nothing is quoted, and nothing but the secret stands there."""
    path = tmp_path / "secret"
    path.write_text(f"# comment\n{secret}\n", encoding="utf-8")
    path.chmod(0o600)
    errors, (warning,) = look(tmp_path, f"auth_shared_secret_file {path}\n")
    assert errors == []
    assert warning.startswith(
        f"{path}:2: warning: auth_shared_secret: a secret with a quote, a blank or the directive's"
    )
    assert "0123456789abcdef" not in warning
    _, (warning,) = look(tmp_path, "", {"GREENARROW_PROXY_AUTH_SHARED_SECRET": secret})
    assert warning.startswith(
        "environment GREENARROW_PROXY_AUTH_SHARED_SECRET: warning: auth_shared_secret: a secret w"
    )


def test_a_variable_that_does_nothing(tmp_path):
    _, (warning,) = look(tmp_path, "", {"GREENARROW_PROXY_LISTN": "127.0.0.1:25"})
    assert warning == (
        "warning: environment: GREENARROW_PROXY_LISTN is not a variable of ours; did you mean GREENARROW_PROXY_LISTEN?"
    )


def test_a_pattern_that_no_file_fits(tmp_path):
    (tmp_path / "one.conf").write_text("")
    _, (warning,) = look(tmp_path, "include *.conf.d\ninclude o*.conf\n")
    assert warning.endswith("warning: include: *.conf.d: no file is called so, beside the file that includes it")
    assert warning.startswith("F:")


def test_a_busy_port_is_left_alone(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        errors, warnings = look(tmp_path, f"listen_proxy_protocol 127.0.0.2:0, 127.0.0.1:{port}\n")
    assert errors == []
    assert warnings == [f"F:4: warning: listen_proxy_protocol: 127.0.0.1:{port} is in use now"]


def test_a_reload_knows_its_own_ports_from_those_of_others(tmp_path, monkeypatch):
    """systemd names the proxy that is to reload: a port that another program has will not be had."""
    with socket.create_server(("127.0.0.1", 0)) as ours:
        port = ours.getsockname()[1]
        text = f"listen_proxy_protocol 127.0.0.1:{port}\n"
        monkeypatch.setenv("MAINPID", str(os.getpid()))
        assert look(tmp_path, text) == ([], [])
        other = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
        try:
            monkeypatch.setenv("MAINPID", str(other.pid))
            (error,), warnings = look(tmp_path, text)
        finally:
            other.kill()
            other.communicate()
    assert warnings == []
    assert error.startswith(f"F:4: listen_proxy_protocol: 127.0.0.1:{port} is in use, and not by the proxy")


def test_what_is_left_of_old_connections_is_in_nobodys_way(tmp_path):
    """TIME_WAIT: the listener takes such a port, and so does the check."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = server.getsockname()
        client = socket.create_connection(endpoint)
        accepted, _ = server.accept()
        accepted.close()
        client.recv(1)
        client.close()
    assert look(tmp_path, f"listen_proxy_protocol 127.0.0.1:{endpoint[1]}\n") == ([], [])


def test_a_listener_on_an_address_that_is_not_here_yet(tmp_path):
    errors, warnings = look(tmp_path, "listen_status 127.0.0.2:0\nlisten 127.0.0.3:0\nlisten 192.0.2.1:807\n")
    assert errors == []
    assert warnings == [
        "F:6: warning: listen: 192.0.2.1:807 is not an address of this machine: nobody can connect to it before it is"
    ]


def test_a_port_that_this_user_may_not_use(tmp_path, monkeypatch):
    """The unit gives the right to it, so it may be good all the same."""

    class Forbidden(socket.socket):
        def bind(self, address):
            if 0 < address[1] < 1024:
                raise PermissionError(13, "Permission denied")
            super().bind(address)

    monkeypatch.setattr(socket, "socket", Forbidden)
    errors, (warning,) = look(tmp_path, "listen 127.0.0.1:807\n")
    assert errors == []
    assert warning.startswith("F:4: warning: listen: 127.0.0.1:807: ports below 1024 need root or CAP_NET_BIND_SERVICE")


def test_certificate_and_key_that_belong_together(tmp_path, pair):
    assert look(tmp_path, f"tls_certificate_file {pair[0]}\ntls_private_key_file {pair[1]}\n") == ([], [])


def test_certificate_and_key_that_do_not(tmp_path, pair, certificates):
    certificates.issue_cert("other.example").private_key_pem.write_to_path(pair[1])
    (error,), _ = look(tmp_path, f"tls_certificate_file {pair[0]}\ntls_private_key_file {pair[1]}\n")
    assert error == (f"F:5: tls_private_key_file: {pair[1]}: this key does not belong to the certificate in {pair[0]}")


def test_certificate_and_key_that_are_swapped(tmp_path, pair):
    (error,), _ = look(tmp_path, f"tls_certificate_file {pair[1]}\ntls_private_key_file {pair[0]}\n")
    assert error == (
        f"F:4: tls_certificate_file: {pair[1]}: there is no certificate (PEM) in it; it has a private key: "
        "are the two files swapped?"
    )


@pytest.mark.parametrize(("bits", "warned"), [(2048, False), (3072, True)])
def test_a_long_rsa_key(tmp_path, bits, warned):
    key = rsa.generate_private_key(65537, bits)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "proxy.example")])
    begin, end = datetime.datetime(2020, 1, 1), datetime.datetime(2100, 1, 1)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, begin, end).sign(key, hashes.SHA256())
    path = tmp_path / "pem"
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(key.private_bytes(*pem) + made.public_bytes(serialization.Encoding.PEM))
    path.chmod(0o600)
    errors, warnings = look(tmp_path, f"tls_certificate_file {path}\ntls_private_key_file {path}\n")
    assert not errors
    assert [f"an RSA key of {bits} bits" in warning for warning in warnings] == [True] * warned


def test_certificate_and_key_in_one_file(tmp_path, pair):
    pair[1].write_bytes(pair[0].read_bytes() + pair[1].read_bytes())
    assert look(tmp_path, f"tls_certificate_file {pair[1]}\ntls_private_key_file {pair[1]}\n") == ([], [])


@pytest.mark.parametrize(("number", "content"), [(0, ""), (0, "x"), (1, ""), (1, "\0")])
def test_certificate_files_with_something_else_in_them(tmp_path, pair, number, content):
    pair[number].write_text(content)
    (error,), _ = look(tmp_path, f"tls_certificate_file {pair[0]}\ntls_private_key_file {pair[1]}\n")
    directive, name = (("tls_certificate_file", "certificate"), ("tls_private_key_file", "private key"))[number]
    assert error == f"F:{4 + number}: {directive}: {pair[number]}: there is no {name} (PEM) in it"


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
    assert error.startswith(f"F:5: tls_private_key_file: {pair[1]}: the key has a password")


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


#: In a block: its own secret.
OWN = " auth_shared_secret 0f9c2b7e54d1a8637bb04e1d92c6f3a5\n"


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        (
            "source_ip 127.0.0.1, 192.0.2.1\ndefault_source_ip 127.0.0.1\n",
            "F:4: warning: source_ip: 192.0.2.1 is not an address",
        ),
        ("source_ip 127.0.0.1\n", "F:4: warning: source_ip: given without default_source_ip"),
        ("default_source_ip 192.0.2.1\n", "F:4: warning: default_source_ip: 192.0.2.1 is not an address"),
        ("idle_timeout 9m\n", "F:4: warning: idle_timeout: below the 10 minutes"),
        ("socks5_auth none\n", "F:4: warning: socks5_auth: none"),
        ("listen_tls no\nlisten 0.0.0.0:0\n", "F:4: warning: listen_tls: no"),
        ("allow_destination 127.0.0.0/8\n", "F:4: warning: allow_destination: loopback"),
        ("throttle a {\n}\n", "F:4: warning: throttle: a: no limit"),
        ("throttle a {\n max_delivery_rate 1/hr\n wait 2m\n}\n", "F:4: warning: throttle: a: wait is cut to 40 s"),
        (
            "throttle a {\n max_delivery_rate 100/min, 50/hr\n}\n",
            "F:4: warning: throttle: a: max_delivery_rate 100 in 60 s is never reached",
        ),
        (
            "throttle a {\n domain example.com\n backoff on 421 { pause }\n max_delivery_rate 1/hr\n}\n",
            "F:4: warning: throttle: a: backoff: of a receiver's replies only refused greetings are seen in mode tcp",
        ),
        (
            "listen 127.0.0.9:0\nthrottle a {\n domain example.com\n backoff on 421 { pause }\n"
            " backoff on 450 { percent 50 }\n}\n",
            "F:5: warning: throttle: a: backoff: percent of no limit is no limit",
        ),
        (
            "listen 127.0.0.9:0\nthrottle a {\n backoff on 421 { pause }\n destination 10.0.0.1, ::/0\n}\n",
            "F:5: warning: throttle: a: backoff: any receiver's reply slows down the mail to all others",
        ),
        (
            "listen 127.0.0.9:0\nthrottle a {\n domain example.com\n backoff on 421 { percent 50 }\n}\n",
            "F:5: warning: throttle: a: no limit is set",
        ),
        (f"instance a {{\n allow_from 127.0.0.2\n{OWN}}}\n", "F:4: warning: instance: a: its allow_from goes beyond"),
        ("instance a {\n source_ip 127.0.0.2\n}\n", "F:4: warning: instance: a: no border without an auth_shared_sec"),
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


def test_the_first_two_hundred_and_how_many_more(tmp_path):
    listed = ", ".join(f"198.51.{n >> 8}.{n & 255}" for n in range(1000))
    errors, warnings = look(tmp_path, f"source_ip {listed}\ndefault_source_ip 198.51.0.7\n")
    assert errors == ["and 801 more warnings"]
    assert len(warnings) == findings.MOST_TOLD


def test_the_work_grows_with_the_number_of_findings_and_not_with_its_square(tmp_path, monkeypatch):
    """Each value was read again for each finding: 78 s for 4,096 addresses that this machine has not."""
    reads = []
    values = Kind.values

    def counted(self, text):
        reads.append(text)
        return values(self, text)

    monkeypatch.setattr(Kind, "values", counted)
    counts = []
    for number in (250, 500):
        reads.clear()
        listed = ", ".join(f"192.0.2.{n & 255}:{1 + n}" for n in range(number))
        look(tmp_path, f"listen_proxy_protocol {listed}\n")
        counts.append(len(reads))
    assert counts[1] - counts[0] == 2 * 250  # once when it is loaded, once for where it stands


@pytest.mark.parametrize(
    "text",
    [
        "source_ip 127.0.0.0/8, 192.0.2.0/24\ndefault_source_ip same\n",
        "listen_tls no\nlisten 127.0.0.2:0\n",
        "idle_timeout 10m\n",
        f"instance a {{\n allow_from 127.0.0.1\n source_ip 10.0.0.0/8\n{OWN}}}\n",
        "instance a {\n weight 2\n}\n",
        "throttle a {\n max_delivery_rate 1/hr\n wait 40s\n}\n",
    ],
)
def test_no_advice(tmp_path, text):
    assert look(tmp_path, text) == ([], [])


def test_it_changes_nothing(tmp_path):
    before = set(os.listdir("/proc/self/fd"))
    look(tmp_path, "listen 127.0.0.2:0\n")
    assert set(os.listdir("/proc/self/fd")) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["f.conf"]


def test_mode_smtp_over_a_network_that_can_be_listened_to(tmp_path):
    shared = "source a {\n ip 192.0.2.1\n ehlo a.example\n}\n"
    door = "listen_proxy_protocol 0.0.0.0:0\n"
    text = "mode: smtp on 0.0.0.0:0: mail that was encrypted from end to end is in clear"

    def warned(more):
        return [line for line in look(tmp_path, more + shared)[1] if text in line]

    assert len(warned("mode smtp\n" + door)) == 1
    assert len(warned("instance a {\n mode smtp\n}\n" + door)) == 1
    assert len(warned("listener 0.0.0.0:0 {\n mode smtp\n}\n" + door)) == 1
    assert warned("mode smtp\nmode_smtp_starttls yes\n" + door) == []
    assert warned("mode smtp\n") == [], "loopback"
    assert warned("listener 127.0.0.1:0 {\n mode smtp\n}\n" + door) == [], "the other door"


def test_mode_smtp_that_shares_nothing(tmp_path):
    assert any("no connection will be shared" in line for line in look(tmp_path, "mode smtp\n")[1])
    assert look(tmp_path, "mode smtp\nsource a {\n ip 127.0.0.1\n ehlo a.example\n}\n")[1] == []


def test_named_sources_that_are_not_on_this_machine(tmp_path):
    """One line a block, however many addresses it has."""
    blocks = "source a {\n ip 127.0.0.1\n}\nsource b {\n ip 192.0.2.1\n}\nsource v* {\n ip 127.0.0.2, 192.0.2.8/29\n}\n"
    assert look(tmp_path, blocks)[1] == [
        "F:7: warning: source: b: 192.0.2.1 is not an address of this machine",
        "F:10: warning: source: v*: 192.0.2.9 is not an address of this machine (nor are 5 more of its addresses)",
    ]


def test_a_time_zone_that_this_machine_does_not_know_is_an_error(tmp_path):
    errors, _ = look(tmp_path, "timezone Nowhere/Atall\n")
    assert errors == ["F:4: timezone: this machine knows no time zone Nowhere/Atall (is tzdata installed?)"]
    assert look(tmp_path, "timezone Pacific/Auckland\n")[0] == []
