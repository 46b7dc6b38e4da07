"""The README's promises that can be run: its configuration, its Python example, its links."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import documents, glossary, peers
from tests.mx import Mx
from tests.program import SECRET, Proxy
from tests.sinks import Sink

pytestmark = pytest.mark.either_form("documents")

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text()


def block(language: str, containing: str) -> str:
    """The one code block of this language with this text in it."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    (found,) = [text for text in blocks if containing in text]
    return found


def test_the_configuration_is_good(tmp_path: Path) -> None:
    """Made as the README makes it, with addresses that this machine has."""
    text = block("", "listen_socks5").replace("10.0.0.1:", "127.0.0.1:").replace("192.0.2.", "127.0.0.")
    script = text.replace("/opt/greenarrow/", f"{tmp_path}/")
    subprocess.run(["sh", "-euc", script], check=True, timeout=60)
    file = tmp_path / "greenarrow_proxy.conf"
    command = [sys.executable, "greenarrow_proxy.py", "--check-config", f"--config-filename={file}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [line for line in done.stderr.splitlines() if "in use now" not in line]


def test_the_message_by_hand_arrives_with_line_ends_of_smtp(tmp_path: Path) -> None:
    """The file is one as editors write it here: a line ends in LF, which SMTP does not allow (RFC 5321, 2.3.8)."""
    peers.program("curl")
    (tmp_path / "message.eml").write_bytes(b"Subject: hello\n\nHello.\n\n.dot\nlast\n")
    with Mx() as mx, Proxy("default_source_ip 127.0.0.14\n") as proxy:
        script = block("", "curl --socks5")
        for old, new in (
            ("10.0.0.1:1080", "{}:{}".format(*proxy.socks5)),
            ("//198.51.100.7", f"//{mx.host}:{mx.port}"),
        ):
            assert old in script
            script = script.replace(old, new)
        command = ["sh", "-euc", script]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"SECRET": SECRET}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        (message,) = mx.messages
    assert message.wire + b"\r\n" == b"Subject: hello\r\n\r\nHello.\r\n\r\n..dot\r\nlast\r\n"


def test_the_python_example_sends_mail() -> None:
    with Sink() as mx, Proxy() as proxy:
        example = block("python", "Session")
        for old, new in (
            ('("10.0.0.1", 807)', repr(proxy.native)),
            ('("198.51.100.7", 25)', repr(mx.endpoint)),
            ("192.0.2.1", "127.0.0.21"),
        ):
            assert old in example
            example = example.replace(old, new)
        environ = os.environ | {"SECRET": SECRET}
        subprocess.run([sys.executable, "-W", "error", "-c", example], cwd=ROOT, check=True, timeout=60, env=environ)
        (message,) = mx.messages
        assert message.peer[0] == "127.0.0.21"
        assert message.content == b"Subject: hello\r\n\r\nHello.\r\n"
        assert proxy.wait_line(r"^connection .* outcome=(\w+)")[1] == "kept"


def test_links_lead_somewhere() -> None:
    """In all documents, to files and to headings. Pictures aside: the benchmark draws them."""
    wrong = []
    for document in documents.texts():
        for file, anchor in documents.links(document.read_text()):
            target = document.parent / file if file else document
            if not target.exists():
                wrong.append(f"{document.name}: there is no {file}")
            elif anchor and anchor not in documents.anchors(target.read_text()):
                wrong.append(f"{document.name}: {target.name} has no #{anchor}")
    assert wrong == []


def test_the_link_checker_sees_what_is_wrong() -> None:
    headings = "# One (a): b_c\n\n## `x` & y\n## One (a): b_c\n```\n# no [heading](nor-link.md)\n```\n"
    text = headings + "[a](b.md#c) [d](#e) ![p](q.png) [w](https://x)\n"
    assert documents.anchors(text) == {"one-a-b_c", "x--y", "one-a-b_c-1"}
    assert documents.links(text) == [("b.md", "c"), ("", "e")]


def test_every_document_is_in_the_table_of_the_readme() -> None:
    for document in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{document.name})" in README, document.name


def test_every_test_that_a_document_names_exists() -> None:
    named = {path.name: documents.tests_named_in(path.read_text()) for path in documents.texts()}
    assert len(named["security.md"]) > 25
    there = documents.tests_there()
    assert {name: missing for name, tests in named.items() if (missing := tests - there)} == {}


def test_every_row_about_what_is_stolen_names_its_tests() -> None:
    for heading in ("A stolen secret", "A stolen MTA"):
        rows = [line for line in documents.section("docs/security.md", heading).splitlines() if line.startswith("| ")]
        assert len(rows) >= 6
        for row in rows[1:]:
            assert documents.tests_named_in(row) or "(no test: " in row or "the same, " in row, row


def test_each_word_of_the_glossary_is_a_link_where_it_is_said_first() -> None:
    """In documents that have such links; `python -m tests.glossary FILE` makes them."""
    linked = [each for each in documents.texts() if f"]({glossary.place_of(each)}#" in each.read_text()]
    assert len(linked) >= 15
    missing = {each.name: glossary.unlinked(each.read_text(), glossary.place_of(each)) for each in linked}
    assert {name: words for name, words in missing.items() if words} == {}
    anchors = documents.anchors((ROOT / "docs" / "glossary.md").read_text())
    assert set(glossary.WORDS) <= anchors


def test_links_are_made_in_prose_only() -> None:
    text = "# A throttle\n`throttle`, a [throttle](x.md) and\n| throttle |\nfor instance a Throttle, throttles\n"
    made = glossary.link(text, "g.md")
    assert made == text.replace("a Throttle", "a [Throttle](g.md#throttle)")
    assert glossary.link(made, "g.md") == made


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150
