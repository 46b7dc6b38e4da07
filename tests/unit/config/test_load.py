"""Command line, environment and file together: layers, rules, and how mistakes are told."""

import dataclasses
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import load as config
from proxy.config.load import BLOCK_TYPES
from proxy.config.options import BLOCKS, OPTIONS
from proxy.errors import ConfigError, UsageError
from proxy.model import Endpoint
from proxy.settings import InstanceSettings, Rate, Settings

DOCUMENTED = """\
listen "0.0.0.0:807"
allow_from 127.0.0.0/24, 10.0.0.0/8
auth_shared_secret "83c2c5f2c0b37b2c0a59d8b4d5c3d1c1"
log_verbose no
"""
SECRET = "Tr0ub4dor-Tr0ub4dor-Tr0ub4dor-Tr0ub4dor"
BASE = f"listen_socks5 127.0.0.1:1080\nallow_from 127.0.0.1\nauth_shared_secret {SECRET}\n"


def networks(*texts):
    return tuple(map(ip_network, texts))


def loaded(text=None, *flags, environ=(), files=()):
    contents = dict(files) | ({} if text is None else {"f": text})

    def read_file(path):
        if path not in contents:
            raise FileNotFoundError(2, "No such file or directory")
        return contents[path]

    argv = list(flags) if text is None else ["--config-filename=f", *flags]
    return config.load(argv, dict(environ), read_file)


def load(*args, **more):
    return loaded(*args, **more).settings


def mistakes(*args, **more):
    with pytest.raises(ConfigError) as caught:
        load(*args, **more)
    return str(caught.value).split("\n")


# ------------------------------------------------------------------ files


def test_the_documented_file_runs_unchanged():
    settings = load(DOCUMENTED)
    assert settings.listen == (Endpoint("0.0.0.0", 807),)
    assert settings.allow_from == networks("127.0.0.0/24", "10.0.0.0/8")
    assert settings.auth_shared_secret == (b"83c2c5f2c0b37b2c0a59d8b4d5c3d1c1",)
    assert settings.log_verbose is False
    assert settings.config_filename == "f"


def test_defaults():
    settings = load(DOCUMENTED)
    given = {"listen", "allow_from", "auth_shared_secret", "listen_proxy_protocol_allow_from"}
    for option in OPTIONS:
        if option.name not in given:
            assert getattr(settings, option.name) == option.default_value(), option.name
    assert settings.listen_proxy_protocol_allow_from == settings.allow_from
    assert settings.listen_status_allow_from == networks("127.0.0.0/8", "::1/128")
    assert settings.destination_port == ((25, 25), (465, 465), (587, 587))
    assert ip_network("10.0.0.0/8") in settings.deny_destination
    assert (settings.idle_timeout, settings.max_connections, settings.workers) == (900.0, None, 1)


def test_denied_destinations_add_to_the_default():
    settings = load(DOCUMENTED + "deny_destination 203.0.113.0/24\n")
    assert ip_network("203.0.113.0/24") in settings.deny_destination
    assert ip_network("10.0.0.0/8") in settings.deny_destination


def test_every_directive_is_a_setting_and_every_setting_a_directive():
    fields = {field.name for field in dataclasses.fields(Settings)}
    assert fields == {option.name for option in OPTIONS} | set(BLOCKS) | {"config_filename"}
    for kind, block in BLOCK_TYPES.items():
        assert {field.name for field in dataclasses.fields(block)} == {o.name for o in BLOCKS[kind]} | {
            "name",
            *(["block"] if kind == "source" else []),
        }


def test_a_repeated_list_adds():
    settings = load(BASE + "allow_from 10.0.0.0/8, ::1\nlisten 127.0.0.1:1\nlisten [::1]:1\n")
    assert settings.allow_from == networks("127.0.0.1/32", "10.0.0.0/8", "::1/128")
    assert settings.listen == (Endpoint("127.0.0.1", 1), Endpoint("::1", 1))


def test_a_repeated_single_directive_names_both_lines():
    assert mistakes(BASE + "log_verbose no\n\nlog_verbose no\n") == [
        "f:6: log_verbose: given twice, in line 4 and in line 6"
    ]


def test_blocks():
    settings = load(
        BASE
        + f"""
instance server-a {{
    allow_from 10.0.0.1
    source_ip 192.0.2.1
    auth_shared_secret "{"x" * 32}"
    weight 2.5
}}
instance "server b" {{
}}
throttle yahoo {{
    source 192.0.2.0/24               # optional; each source IP counts by itself
    destination 67.195.204.0/24, 98.136.96.0/24
    max_concurrent_connections 20
    max_delivery_rate 1000/hr, 50/min         # connections
    max_delivery_rate 0
    wait 5s
}}
"""
    )
    first, second = settings.instance
    assert first.name == "server-a"
    assert (first.allow_from, first.source_ip) == (networks("10.0.0.1"), networks("192.0.2.1"))
    assert (first.auth_shared_secret, first.weight) == ((b"x" * 32,), 2.5)
    nothing = {"allow_from": (), "source_ip": (), "auth_shared_secret": ()}
    assert second == InstanceSettings(name="server b", weight=1.0, **nothing)
    (throttle,) = settings.throttle
    assert throttle.destination == networks("67.195.204.0/24", "98.136.96.0/24")
    assert throttle.max_delivery_rate == (Rate(1000, 3600), Rate(50, 60))
    assert (throttle.max_concurrent_connections, throttle.wait) == (20, 5.0)


def test_blocks_of_mode_smtp():
    settings = load(
        BASE
        + """
listen_socks5 10.0.0.1:1080, [2001:DB8::1]:1080
mode smtp
instance kumo {
    mode tcp
    smtp_tls required
    share_with pool
}
listener [2001:db8:0::1]:1080 {
    mode tcp
    default_source_ip 192.0.2.7
}
source vmta1 {
    ip 192.0.2.1, 2001:db8::7
    ehlo mail1.example.com
}
source vmta2 {
    ip 192.0.2.2
}
"""
    )
    (kumo,) = settings.instance
    assert (settings.mode, settings.smtp_tls) == ("smtp", "opportunistic")
    assert (kumo.mode, kumo.smtp_tls, kumo.share_with) == ("tcp", "required", "pool")
    assert [(block.name, block.mode) for block in settings.listener] == [("[2001:db8::1]:1080", "tcp")]
    assert settings.listener[0].default_source_ip == ("192.0.2.7",)
    assert [block.ehlo for block in settings.source] == ["mail1.example.com", None]
    assert settings.source[0].ip == networks("192.0.2.1", "2001:db8::7")


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (
            "listener 10.0.0.9:1080 {\n}",
            "is not in listen_socks5, listen_proxy_protocol, the same with _tls or listen_redirect",
        ),
        ("listener kumo {\n}", "is not the IP:port of a listener"),
        (
            "listen_socks5 10.0.0.1:1080\nlistener 10.0.0.1:1080 {\n    default_source_ip same, 192.0.2.2\n}",
            "listener: default_source_ip: `same` stands alone",
        ),
        (
            "source_ip 192.0.2.1\nlisten_socks5 10.0.0.1:1080\n"
            "listener 10.0.0.1:1080 {\n    default_source_ip 192.0.2.2\n}",
            "default_source_ip: 192.0.2.2 is not in source_ip",
        ),
        ("source a {\n}", "a: `ip` is missing"),
        ("source a {\n    ip 10.0.0.0/8\n}", "is not an IP address, a range or a CIDR such as"),
        ("source a {\n    ip 192.0.2.1\n}\nsource b {\n    ip 192.0.2.1\n}", "192.0.2.1 is in two blocks, a and b"),
        ("source a {\n    ip 192.0.2.1\n    ehlo a_b c\n}", "a comma is missing"),
        ('source a {\n    ip 192.0.2.1\n    ehlo "x y"\n}', "is not an EHLO name such as"),
        ("instance a {\n    mode http\n}", "is not tcp or smtp"),
    ],
)
def test_blocks_of_mode_smtp_that_are_wrong(block, words):
    assert any(words in mistake for mistake in mistakes(BASE + block + "\n"))


def test_secrets_of_files_are_added():
    text = BASE + "auth_shared_secret_file a, `b`\n"
    files = {
        "a": "\ufeff# two years old, take it out in May 2027\r\n" + "a" * 32 + "\r\n\n",
        "b": "#\n" + "b b " * 8 + "b\n",
    }
    settings = load(text, files=files)
    assert settings.auth_shared_secret == (SECRET.encode(), b"a" * 32, b"b b " * 8 + b"b")
    assert settings.auth_shared_secret_file == ("a", "b")


def test_a_reload_sees_the_file_as_it_is_now():
    contents = {"f": DOCUMENTED}
    argv = ["--config-filename=f"]
    assert not config.load(argv, {}, contents.__getitem__).settings.log_verbose
    contents["f"] = DOCUMENTED.replace("log_verbose no", "log_verbose yes")
    assert config.load(argv, {}, contents.__getitem__).settings.log_verbose


# ------------------------------------------------------------------ layers


def test_a_flag_beats_the_environment_which_beats_the_file():
    text = BASE + "log_format json\nstats_interval 1s\nidle_timeout 1h\n"
    environ = {"GREENARROW_PROXY_LOG_FORMAT": "text", "GREENARROW_PROXY_STATS_INTERVAL": "2s"}
    settings = load(text, "--stats-interval=3s", environ=environ)
    assert (settings.log_format, settings.stats_interval, settings.idle_timeout) == ("text", 3.0, 3600.0)


def test_a_list_from_a_stronger_source_replaces_the_weaker_one():
    settings = load(BASE, "--allow-from", "::1, 10.0.0.0/8", "--allow-from=127.0.0.2")
    assert settings.allow_from == networks("::1/128", "10.0.0.0/8", "127.0.0.2/32")
    environ = {"GREENARROW_PROXY_ALLOW_FROM": "127.0.0.3,127.0.0.4"}
    assert load(BASE, environ=environ).allow_from == networks("127.0.0.3", "127.0.0.4")


def test_everything_can_come_without_a_file():
    environ = {"GREENARROW_PROXY_ALLOW_FROM": "127.0.0.1"}
    settings = load(None, "--listen-socks5=[::1]:0", "--socks5-auth=none", environ=environ)
    assert settings.listen_socks5 == (Endpoint("::1", 0),)
    assert settings.config_filename is None


def test_the_file_can_be_named_in_the_environment():
    contents = {"f": DOCUMENTED}
    environ = {"GREENARROW_PROXY_CONFIG_FILENAME": "f"}
    assert config.load([], environ, contents.__getitem__).settings.config_filename == "f"


@pytest.mark.parametrize(
    ("flag", "value"), [("--log-verbose", True), ("--log-verbose=yes", True), ("--log-verbose=no", False)]
)
def test_a_switch(flag, value):
    assert load(BASE + "log_verbose no\n", flag).log_verbose is value


@pytest.mark.parametrize(
    "secret", ["[" + "a, b" * 8 + "]", '["' + "a" * 32 + '"]', "a," * 20, "-" * 32, '"' + "a" * 32]
)
def test_a_secret_outside_the_file_is_taken_as_it_is(secret):
    """ConfigArgParse by itself reads an environment value in brackets as a list."""
    environ = {"GREENARROW_PROXY_AUTH_SHARED_SECRET": secret}
    assert load(BASE, environ=environ).auth_shared_secret == (secret.encode(),)
    assert load(BASE, f"--auth-shared-secret={secret}").auth_shared_secret == (secret.encode(),)


def test_an_empty_variable_is_not_set_and_an_unknown_one_is_ignored():
    empty = dict.fromkeys((f"GREENARROW_PROXY_{name}" for name in ("LOG_VERBOSE", "LOG_FORMAT", "ALLOW_FROM")), "")
    environ = empty | {"GREENARROW_PROXY_PORT": "tcp://10.0.0.1:807"}  # Kubernetes sets such
    settings = load(BASE + "log_verbose yes\nlog_format json\n", environ=environ)
    assert (settings.log_verbose, settings.log_format) == (True, "json")
    assert settings.allow_from == networks("127.0.0.1")


@pytest.mark.parametrize(
    ("name", "doubt"),
    [
        ("LISTN", "GREENARROW_PROXY_LISTN is not a variable of ours; did you mean GREENARROW_PROXY_LISTEN?"),
        ("CONFIG_FILE", "GREENARROW_PROXY_CONFIG_FILE is not a variable of ours; did you mean GREENARROW_PROXY_CONFIG"),
        ("XYZZY", "GREENARROW_PROXY_XYZZY is not a variable of ours"),
        ("PURE", ""),
        ("OPTIMISE", ""),
        ("CORE", ""),
        ("LISTEN", ""),
        ("PORT_807_TCP_ADDR", ""),
        ("SERVICE_PORT_SOCKS5", ""),
    ],
)
def test_a_variable_that_does_nothing_is_told(name, doubt):
    found = loaded(BASE, environ={f"GREENARROW_PROXY_{name}": "127.0.0.1:99", "HOME": "/"}).doubts
    assert len(found) == bool(doubt)
    assert "".join(found).startswith(doubt)


def test_every_piece_of_a_long_configuration_takes_a_breath():
    """A reload lets others run there: no piece may be a long one, wherever the values stand."""

    def breaths(text):
        taken = []
        config.load(["--config-filename=f"], {}, lambda path: BASE + text, lambda: taken.append(1))
        return len(taken)

    bare = breaths("")
    listed = ", ".join(f"10.{n >> 8}.{n & 255}.0/24" for n in range(1000))
    assert breaths(f"allow_from {listed}\n") - bare >= 5 * 1000  # token, list, text, value
    assert breaths(f"deny_destination {listed}\n") - bare >= 6 * 1000  # and doubles
    blocks = "".join(f"instance i{n} {{\n allow_from 10.{n >> 8}.{n & 255}.1\n}}\n" for n in range(1000))
    assert breaths(blocks) - bare >= 6 * 1000  # three lines, value, secrets, owner
    doors = "".join(f"listen_proxy_protocol 127.0.0.2:{1 + n}\n" for n in range(1000))
    assert breaths(doors) - bare >= 4 * 1000


def test_an_empty_value_in_the_file_is_not_overlooked():
    """ConfigArgParse by itself skips an empty value of an option like --log-verbose."""
    assert mistakes(BASE + 'log_verbose ""\n') == ['f:4: log_verbose: "" is not yes or no']


def test_a_long_list_is_no_trouble():
    """argparse by itself needs quadratic time for the arguments that ConfigArgParse would make of it."""
    many = ", ".join(f"10.{i >> 8}.{i & 255}.0/24" for i in range(20_000))
    assert len(load(BASE + f"allow_from {many}\n").allow_from) == 20_001


def test_origins_tell_where_values_stand():
    environ = {"GREENARROW_PROXY_LOG_FORMAT": "json"}
    argv = ["--config-filename=f", "--stats-interval=1s"]
    origins = config.load(argv, environ, lambda path: BASE).origins
    assert origins.of("allow_from") == [("127.0.0.1", "f", 2)]
    assert origins.of("log_format") == [("json", "environment GREENARROW_PROXY_LOG_FORMAT", 0)]
    assert origins.of("stats_interval") == [("1s", "command line", 0)]
    assert origins.of("log_verbose") == ()
    assert origins.place("log_verbose") == ("", "f", 0)


# ------------------------------------------------------------------ mistakes


def test_all_mistakes_are_told_each_with_its_place():
    text = (
        "listn 127.0.0.1:1\nallow_from 10.0.0.1/8\nauth_shared_secret short\nidle_timeout 30\n"
        "instance a {\n weight 99\n wait 1s\n}\n"
    )
    assert mistakes(text, "--log-format=xml", environ={"GREENARROW_PROXY_WORKERS": "x"}) == [
        'f:1: unknown directive "listn"; did you mean listen?',
        'f:2: allow_from: "10.0.0.1/8" is not an IP address, a range or a CIDR such as 192.0.2.7, 192.0.2.1-192.0.2.6, '
        "10.0.0.0/8 or fd00::/8 (the network is 10.0.0.0/8, the address alone 10.0.0.1)",
        "f:3: auth_shared_secret: the value is not a secret of at least 32 characters (it is shorter)",
        'f:4: idle_timeout: "30" is not a duration such as 30s, 15m or 4h15m (a unit is missing: d, h, m, s or ms)',
        'f:6: instance "a": weight: "99" is not a number from 0.0625 to 16',
        'f:7: instance "a": wait: belongs in a block: `throttle NAME {`',
        'environment GREENARROW_PROXY_WORKERS: workers: "x" is not a number of processes, 1 to 64, or the word auto',
        'command line: log_format: "xml" is not text or json',
        "f: listen: no listener: give listen, listen_socks5, listen_proxy_protocol, listen_socks5_tls, "
        "listen_proxy_protocol_tls or listen_redirect",
    ]


def test_a_single_mistake_has_its_place_in_the_error():
    with pytest.raises(ConfigError) as caught:
        load(BASE + "workers x\n")
    assert (caught.value.file, caught.value.line) == ("f", 4)


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("log_verbose yes, no", "f:4", "takes one value"),
        ("listen-socks5 127.0.0.1:1", "f:4", "did you mean listen_socks5?"),
        ("Log_Verbose yes", "f:4", "did you mean log_verbose?"),
        ("idle_timeout 15 m", "f:4", "no blank between a number and its unit: 15m"),
        ('idle_timeout "15 m"', "f:4", "(write it without a blank)"),
        ("max_connections 10 000", "f:4", "no blank between a number and its unit: 10000"),
        ("log_format \u201cjson\u201d", "f:4", "log_format: column 12: character U+201C is no quote here"),
        ("log_format 'json'", "f:4", "log_format: column 12: ' is no quote here"),
        ("log_format 'js on'", "f:4", "log_format: column 12: ' is no quote here"),
        ("allow_from ::1, 'x'", "f:4", "allow_from: column 17: ' is no quote here"),
        ("log_format json;", "f:4", "log_format: column 16: no `;` behind a value"),
        ("allow_from ::1, ::2 ;", "f:4", "allow_from: column 21: no `;` behind a value"),
        ("allow_from 192.0.2.6-192.0.2.1", "f:4", "the lower address of a range comes first"),
        ("weight 1", "f:4", "belongs in a block"),
        ("instance a", "f:4", "this is a block"),
        ("instance a b", "f:4", "a comma is missing"),
        ("instanc a {\n nonsense 1\n}", "f:4", 'unknown block "instanc"; did you mean instance?'),
        ("instance a {\n listen 127.0.0.1:1\n}", "f:5", "does not belong in this block"),
        ("instance a {\n}\ninstance a {\n}", "f:6", "given twice, in line 4 and in line 6"),
        ("throttle a {\n wait 1s\n wait 1s\n}", "f:6", "given twice, in line 5 and in line 6"),
        ('throttle "" {\n}', "f:4", "is not a name"),
        ('throttle "a\\n" {\n}', "f:4", "is not a name"),
        (f"throttle {'a' * 65} {{\n}}", "f:4", "at most 64 characters"),
        ("log_verbose", "f:4", "log_verbose: a value is missing"),
        ("log_verbose=yes", "f:4", "log_verbose: a line begins"),
        ('listen "127.0.0.1:1', "f:4", "listen: column 8: the quote is not closed"),
        ("tls_certificate_file x", "f:4", "tls_private_key_file is missing"),
        ("tls_private_key_file x", "f:4", "tls_certificate_file is missing"),
        ("workers 65", "f:4", "is not a number of processes, 1 to 64, or the word auto"),
        (f"throttle_store {SECRET}", "f:4", "the value is not memory, or an address such as redis://"),
        (f"throttle_store redis://@{SECRET}", "f:4", "before the @ stands user:password, :password or user"),
        ("listen 127.0.0.1:1080", "f:1", "127.0.0.1:1080 is taken by listen 127.0.0.1:1080"),
        ("listen_status 0.0.0.0:1080", "f:4", "is taken by listen_socks5 127.0.0.1:1080"),
        ("default_source_ip 192.0.2.1, 192.0.2.2", "f:4", "more than one IPv4 address"),
        ("default_source_ip ::2, ::3", "f:4", "more than one IPv6 address"),
        ("default_source_ip same, 192.0.2.2", "f:4", "stands alone"),
        ("default_source_ip 127.0.0.1", "f:4", "is not in source_ip"),
        ("source_ip 192.0.2.0/24\ndefault_source_ip 198.51.100.1", "f:5", "is not in source_ip"),
        ("instance a {\n allow_from ::1\n}\ninstance b {\n allow_from ::1\n}", "f:7", "is in two blocks, a and b"),
        ("auth_shared_secret " + "x" * 256, "f:4", "at most 255 bytes"),
        ("auth_shared_secret_file nowhere", "f:4", "nowhere: No such file or directory"),
        ("auth_shared_secret_file empty", "f:4", "there is no secret in the file"),
        ("auth_shared_secret_file short", "short:2", "auth_shared_secret: the value is not a secret"),
    ],
)
def test_one_mistake(text, place, words):
    found = mistakes(BASE + text + "\n", files={"empty": "# x\n", "short": "\nabc\n"})
    assert len(found) == 1
    assert found[0].startswith(place + ": ")
    assert words in found[0]
    assert SECRET not in found[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["f: nothing is configured: a listener and allow_from are required"]),
        ("# allow_from ::1", ["f: nothing is configured"]),
        ("log_verbose no", ["listen: no listener", "allow_from: required"]),
        ("listen_status 127.0.0.1:1\nallow_from ::1", ["listen: no listener"]),
        ("listen 127.0.0.1:1\nallow_from ::1", ["auth_shared_secret: required with listen;"]),
        ("listen_socks5 127.0.0.1:1\nallow_from ::1", ["auth_shared_secret: required with listen_socks5;"]),
        ("listen_proxy_protocol 127.0.0.1:1", ["allow_from: required"]),
        ("listen foo\nallow_from", ["listen: ", "allow_from: a value is missing"]),
    ],
)
def test_what_is_required_is_called_missing_only_where_it_is(text, words):
    found = mistakes(text)
    assert len(found) == len(words)
    assert all(word in line for word, line in zip(words, found, strict=True))


@pytest.mark.parametrize(
    "text",
    [
        "listen_proxy_protocol 127.0.0.1:1\nallow_from ::1",
        "listen_socks5 127.0.0.1:1\nallow_from ::1\nsocks5_auth none",
        f"listen 127.0.0.1:1\nallow_from ::1\ninstance a {{\nauth_shared_secret {SECRET}\n}}",
        BASE + "listen 127.0.0.2:0, 127.0.0.3:0\nlisten_status 0.0.0.0:0",
        BASE + "listen 127.0.0.2:1080\nlisten_status [::]:1080",
        BASE + "source_ip 127.0.0.0/8\ndefault_source_ip 127.0.0.9, ::1".replace(", ::1", ""),
        BASE + "instance a {\n source_ip 127.0.0.1\n}\ndefault_source_ip 127.0.0.1",
        BASE + "default_source_ip same",
    ],
)
def test_no_mistake(text):
    load(text)


def test_a_file_that_cannot_be_read_is_the_only_mistake():
    assert mistakes(None, "--config-filename=nowhere") == ["nowhere: No such file or directory"]

    def broken(path):
        return "log_verbose nö\r\nlisten ÿ".encode("latin-1").decode()

    with pytest.raises(ConfigError, match=r"^f:1: column 14: byte 0xF6 is not UTF-8; if the file is Latin-1, save"):
        config.load(["--config-filename=f"], {}, broken)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("listen ::1\n".encode("utf-16"), "f:1: the file is UTF-16; save it as UTF-8"),
        ("listen ::1\n".encode("utf-16-le"), "f:1: the file is UTF-16; save it as UTF-8"),
        ("listen ::1\n".encode("utf-16-be"), "f:1: the file is UTF-16; save it as UTF-8"),
        (
            b"listen ::1\n\xc3\xa4\xe9\n",
            "f:2: column 2: byte 0xE9 is not UTF-8; if the file is Latin-1, save it as UTF-8",
        ),
        (b"x" * 10_000_000, "f: the file is longer than 4194304 characters"),
        (b"", "f: nothing is configured: a listener and allow_from are required"),
    ],
    ids=["utf16", "utf16le", "utf16be", "latin1", "10MB", "empty"],
)
def test_a_file_of_another_kind_is_one_message(content, message):
    def read_file(path):
        return content.decode()

    with pytest.raises(ConfigError) as caught:
        config.load(["--config-filename=f"], {}, read_file)
    assert str(caught.value) == message


def test_a_secret_file_of_another_kind_is_told_with_its_own_name():
    def read_file(path):
        return BASE + "auth_shared_secret_file s\n" if path == "f" else b"# comment\n\xe9".decode()

    with pytest.raises(ConfigError, match=r"^s:2: auth_shared_secret_file: column 1: byte 0xE9 is not UTF-8;"):
        config.load(["--config-filename=f"], {}, read_file)


def test_without_any_file_the_flag_for_it_is_named():
    assert "--config-filename=FILE" in mistakes(None)[0]


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("ok.conf", "an argument that belongs to no flag; did you mean --config-filename=FILE?"),
        ("--config=x", 'unknown flag "--config"; did you mean --config-filename?'),
        ("--conf=x", 'unknown flag "--conf"; did you mean --config-filename?'),
        ("--listn=1", 'unknown flag "--listn"; did you mean --listen?'),
        ("--list", "unknown flag"),
        ("--listen", "expected one argument"),
        (SECRET, "an argument that belongs to no flag"),
        (f"--auth-shared-secrets={SECRET}", 'unknown flag "--auth-shared-secrets"; did you mean --auth-shared-secret?'),
        (f"--{SECRET}{SECRET}", "an argument that belongs to no flag"),
    ],
)
def test_a_command_line_that_cannot_be_understood(flag, words):
    with pytest.raises(UsageError) as caught:
        load(BASE, flag)
    assert words in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_flag_given_twice_is_a_mistake_too():
    assert mistakes(BASE, "--log-format=text", "--log-format=json") == ["command line: log_format: given twice"]
    assert mistakes(BASE, "--allow-from=::1,,::2") == ["command line: allow_from: a value is missing"]


def test_what_a_word_alone_on_a_line_is_called_depends_on_its_length():
    """A secret that slid to a line of its own is not shown."""
    assert "not shown" in mistakes(BASE + "Troubadour" * 4 + " x\n")[0]
    assert '"Troubadour"' in mistakes(BASE + "Troubadour x\n")[0]


def test_the_wrong_file_does_not_fill_the_log():
    found = mistakes(BASE + "nonsense 1\n" * 1000)
    assert len(found) == config.MOST_MISTAKES + 1
    assert found[-1] == "and 800 more mistakes"


def test_a_value_in_a_message_is_escaped_and_cut():
    found = mistakes(BASE, "--log-format=\x1b[31m\udc80" + "x" * 100)
    assert found == ['command line: log_format: "\\u001b[31m\\udc80' + "x" * 54 + '..." is not text or json']


def test_a_secret_is_in_no_repr():
    settings = load(BASE + f'instance a {{\n auth_shared_secret "{SECRET}x"\n}}\n')
    assert SECRET not in repr(settings)


# ------------------------------------------------------------------ fuzz

NAMES = [option.name for option in OPTIONS] + [option.name for block in BLOCKS.values() for option in block]
WORDS = [
    "yes",
    "10s",
    "1.2.3.4",
    "1.2.3.4:5",
    "[::]:0",
    "::/0",
    "same",
    "25-26",
    "5/s",
    "memory",
    "auto",
    "7",
    "x" * 40,
]
LINES = st.builds("{} {}".format, st.sampled_from(NAMES), st.sampled_from(WORDS) | st.text(max_size=20))
BLOCK = st.builds("{} {} {{\n{}\n}}".format, st.sampled_from(sorted(BLOCKS)), st.sampled_from("ab"), LINES)


@given(st.lists(st.one_of(LINES, BLOCK, st.text())).map("\n".join))
def test_a_file_gives_settings_or_a_config_error(text):
    try:
        load(text, files={word: word for word in WORDS})
    except ConfigError as error:
        assert not isinstance(error, UsageError)  # noqa: PT017  success is fine too


@given(
    st.lists(st.builds("--{}={}".format, st.sampled_from(NAMES).map(lambda name: name.replace("_", "-")), st.text())),
    st.dictionaries(st.sampled_from(["GREENARROW_PROXY_" + name.upper() for name in NAMES]), st.text()),
)
def test_flags_and_variables_give_settings_or_a_config_error(flags, environ):
    try:
        load(BASE, *flags, environ=environ)
    except ConfigError:
        return


@given(st.lists(st.text()))
def test_any_command_line_gives_settings_or_a_config_error(argv):
    try:
        load(BASE, *argv)
    except ConfigError:
        return


@given(st.integers(0, len(BASE)), st.text(max_size=3))
def test_a_damaged_file_shows_no_secret(position, damage):
    text = BASE[:position] + damage + BASE[position:]
    try:
        load(text)
    except ConfigError as error:
        assert SECRET[10:-2] not in str(error)  # noqa: PT017  success is fine too
