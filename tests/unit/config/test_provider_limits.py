"""etc/throttles: limits for large providers, as they are shipped."""

import re
from pathlib import Path

import pytest

from proxy.config import load as config

FOLDER = Path(__file__).parents[3] / "etc" / "throttles"
FILES = sorted(FOLDER.glob("*.conf"))
BASE = "listen_socks5 127.0.0.1:1080\nsocks5_auth none\nallow_from 127.0.0.1\n"
#: Where a figure comes from, or that it is one's own.
ORIGIN = re.compile(r"\bGuess\b|\bKumoMTA's (default|community rules)|\bComcast: ")


def blocks(path):
    return config.load(["--config-filename=f"], {}, lambda _: BASE + path.read_text(encoding="utf-8")).settings.throttle


def test_there_is_one_for_each_large_provider():
    names = ("comcast", "every-receiver", "gmail", "gmx", "icloud", "orange", "outlook", "yahoo")
    assert tuple(path.stem for path in FILES) == names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_figure_has_its_origin_beside_it(path):
    figures = [line for line in path.read_text(encoding="utf-8").splitlines() if re.match(r" +max_", line)]
    rules = [line for line in path.read_text(encoding="utf-8").splitlines() if re.match(r" +backoff ", line)]
    assert [line for line in rules if not ORIGIN.search(line.partition("}")[2])] == []
    assert len(rules) == sum(len(block.backoff) for block in blocks(path))
    assert [line for line in figures if not ORIGIN.search(line.partition("#")[2])] == []
    limits = sum(
        bool(block.max_concurrent_connections) + len(block.max_delivery_rate) + len(block.max_connection_rate)
        for block in blocks(path)
    )
    assert limits == len(figures) > 0


def test_no_domain_stands_in_two_files():
    """Several blocks may hold for one connection, but not by mistake."""
    owners = [(domain, path.stem) for path in FILES for domain in {d for block in blocks(path) for d in block.domain}]
    assert len({domain for domain, _ in owners}) == len(owners)
