"""The option table against what users read: sample file, manual pages, docs/configuration.md, --help."""

import ipaddress
import re
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from proxy.config import file, load
from proxy.config.options import BLOCKS, OPTIONS
from proxy.config.rules import PUBLISHED_SECRETS

ROOT = Path(__file__).parents[3]
SAMPLE = (ROOT / "etc/greenarrow_proxy.conf").read_text(encoding="utf-8")
PAGE_1 = (ROOT / "man/greenarrow_proxy.1").read_text(encoding="utf-8")
PAGE_5 = (ROOT / "man/greenarrow_proxy.conf.5").read_text(encoding="utf-8")
DOCS = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")

DOCUMENTED = """\
listen "0.0.0.0:807"
allow_from 127.0.0.0/24, 10.0.0.0/8
auth_shared_secret "00000000000000000000000000000000"
log_verbose no
"""

#: Section of the manual page and of the document → its options.
SECTIONS = {"": OPTIONS} | BLOCKS
EVERYTHING = [(section, option) for section, options in SECTIONS.items() for option in options]
IDS = [f"{section}.{option.name}" for section, option in EVERYTHING]


def sample_uncommented():
    """The commented-out lines as a file of their own. Prose has a blank behind the #, directives have none."""
    lines = [line[1:] for line in SAMPLE.split("\n") if re.match(r"#(\S|    \S)", line)]
    return "\n".join(lines) + "\n"


def page_5_section(section):
    parts = re.split(r"^\.Ss (\w+) blocks$", PAGE_5, flags=re.MULTILINE)
    return dict(zip(["", *(kind.lower() for kind in parts[1::2])], parts[::2], strict=True))[section]


def docs_section(section):
    parts = re.split(r"^### `(\w+) NAME .*$", DOCS, flags=re.MULTILINE)
    return dict(zip(["", *parts[1::2]], parts[::2], strict=True))[section]


def docs_row(section, option):
    rows = re.findall(rf"^\| `{option.name}` \|(.*)$", docs_section(section), flags=re.MULTILINE)
    assert len(rows) == 1, f"{option.name}: {len(rows)} rows in docs/configuration.md"
    return [cell.strip() for cell in rows[0].split(" |")]


def test_the_sample_ends_with_the_documented_example_and_nothing_else_is_active():
    active = [line for line in SAMPLE.split("\n") if line and not line.startswith("#")]
    assert "\n".join(active) + "\n" == DOCUMENTED
    assert SAMPLE.endswith("\n" + DOCUMENTED)


def test_the_sample_is_valid_with_every_line_taken_in():
    """But for what this version refuses, nothing in it is only decoration."""

    def read_file(path):
        return (
            re.sub("[01]{32}", "drawn-at-random-by-the-operator-1", sample_uncommented()) if path == "f" else "x" * 32
        )

    settings = load.load(["--config-filename=f"], {}, read_file).settings
    for option in OPTIONS:
        if option.default is not None:
            assert getattr(settings, option.name) == option.default_value(), option.name
    assert settings.instance[0].weight == 1.0
    assert (settings.throttle[0].max_concurrent_connections, settings.throttle[0].wait) == (0, 20.0)


def test_a_start_refuses_every_secret_that_is_published():
    """Whoever took it over as it stands would let everybody in allow_from send mail."""
    shown = [sample_uncommented(), SAMPLE, PAGE_5, DOCS]
    shown += [path.read_text(encoding="utf-8") for path in sorted((ROOT / "etc/clients").iterdir()) if path.is_file()]
    secrets = [secret for text in shown for secret in re.findall(r'auth_shared_secret "(.*?)"', text)]
    assert {secret.encode() for secret in secrets} == PUBLISHED_SECRETS


def test_what_is_not_globally_reachable_is_denied():
    """Held against the registries that Python keeps, at the edges of each network that it knows."""
    (option,) = [option for option in OPTIONS if option.name == "deny_destination"]
    denied = option.default_items()
    #: Judged by what lies behind them, see `policy.access`; mapped ones are folded; of the last the registry says N/A.
    judged = [ip_network(text) for text in ("::/96", "::ffff:0:0/96", "64:ff9b:1::/48", "2002::/16")]
    edges = [ip for network in denied for ip in (network[0], network[-1])]
    known = [*ipaddress._IPv4Constants._private_networks, *ipaddress._IPv6Constants._private_networks]
    edges += [ip for network in known for ip in (network[0], network[-1])]
    for ip in [neighbour for edge in edges for neighbour in _near(edge)]:
        if not ip.is_global and not any(ip in network for network in judged if ip.version == 6):
            assert any(ip in network for network in denied if network.version == ip.version), ip
    for text in (
        "fec0::1",
        "ff0e::1",
        "224.0.1.1",
        "240.0.0.1",
        "255.255.255.255",
        "2001:db8::1",
        "198.18.0.1",
        "192.0.0.1",
    ):
        ip = ip_address(text)
        assert any(ip in network for network in denied if network.version == ip.version), text
    for text in (
        "8.8.8.8",
        "192.0.1.1",
        "198.20.0.1",
        "223.255.255.255",
        "2001:200::1",
        "2a00::1",
        "2606::1",
        "3ffe::1",
    ):
        ip = ip_address(text)
        assert not any(ip in network for network in denied if network.version == ip.version), text


def _near(ip):
    return [type(ip)(value) for value in (int(ip) - 1, int(ip), int(ip) + 1) if 0 <= value < 1 << ip.max_prefixlen]


@pytest.mark.parametrize(("section", "option"), EVERYTHING, ids=IDS)
def test_it_is_in_the_sample(section, option):
    document = file.parse(sample_uncommented(), "sample")
    blocks = {block.kind: block.directives for block in document.blocks}
    directives = blocks[section] if section else document.directives
    given = [value for directive in directives if directive.name == option.name for value in directive.values]
    assert given, f"{option.name} is not in etc/greenarrow_proxy.conf"
    if option.default is not None:
        assert ", ".join(given) == option.default


@pytest.mark.parametrize(("section", "option"), EVERYTHING, ids=IDS)
def test_it_is_in_manual_page_5(section, option):
    entries = re.split(r"^\.It Ic ", page_5_section(section), flags=re.MULTILINE)[1:]
    found = [entry for entry in entries if entry.startswith(option.name + " ")]
    assert len(found) == 1, f"{option.name}: {len(found)} entries in man/greenarrow_proxy.conf.5"
    heading, _, text = found[0].partition("\n")
    assert (", ..." in heading) == option.repeatable
    if option.default is not None:
        text = " ".join(re.sub(r"^\..*$", "", text, flags=re.MULTILINE).split())
        assert option.default in text


@pytest.mark.parametrize("option", OPTIONS, ids=[option.name for option in OPTIONS])
def test_its_flag_is_in_manual_page_1(option):
    name = option.flag.removeprefix("--")
    found = re.findall(rf"^\.It Fl Fl {name} .*\n((?:[^.].*\n)+)", PAGE_1, flags=re.MULTILINE)
    assert len(found) == 1
    if option.default is not None and len(option.default) < 15 and option.name not in ("throttle_store", "workers"):
        assert f"({option.default})" in found[0]


@pytest.mark.parametrize(("section", "option"), EVERYTHING, ids=IDS)
def test_it_is_in_the_documents(section, option):
    value, default, *_ = docs_row(section, option)
    assert value.startswith("list of") == (option.repeatable and option.name != "default_source_ip")
    if option.name == "deny_destination":
        assert f"`{option.default}`" in " ".join(DOCS.split())
    elif option.default is not None:
        assert default == f"`{option.default}`"
    else:
        assert not default.startswith("`")


def test_the_documents_name_no_other_option():
    for section, options in SECTIONS.items():
        names = {option.name for option in options}
        in_page = set(re.findall(r"^\.It Ic (\w+) ", page_5_section(section), flags=re.MULTILINE))
        in_docs = set(re.findall(r"^\| `(\w+)` \|", docs_section(section), flags=re.MULTILINE))
        assert in_page == names
        assert in_docs == names
    flags = {action.option_strings[-1] for action in load.build_parser()._actions}
    in_page = set(re.findall(r"^\.It (?:Fl h , )?Fl Fl ([a-z0-9-]+)", PAGE_1, flags=re.MULTILINE))
    assert {"--" + name for name in in_page} == flags


def test_help_names_every_flag_and_default():
    text = " ".join(load.build_parser().format_help().split())
    for option in OPTIONS:
        assert option.flag + " " in text
        assert option.help in text
        if option.default is not None and option.name != "deny_destination":
            assert f"({option.default})" in text


def test_every_default_is_valid():
    for _, option in EVERYTHING:
        option.default_value()
        assert option.help
        assert option.metavar
