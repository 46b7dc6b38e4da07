"""The status page in a real browser, on a desk and on a telephone, by day and by night, judged by axe, with and without
its script; and what HTTP says of it: gzip, HEAD, and how much it is at most."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import re
import threading
import time

import msgspec
import pytest

from greenarrow_proxy_client import Session
from greenarrow_proxy_client.throttle import Limits
from proxy.status.page import pieces
from proxy.status.rows import MinuteRow, Status
from tests.browser import Browser
from tests.clients import Refused, socks5
from tests.mx import Mx, close, say
from tests.peers import missing
from tests.program import ROOT, SECRET, Proxy
from tests.sinks import Raw, greet
from tests.waiting import wait_for

pytestmark = pytest.mark.either_form("what a browser makes of the page")

SOURCE = "127.0.0.9"
AXE = ROOT / ".cache" / "node" / "node_modules" / "axe-core" / "axe.min.js"
HOSTILE = '<img src=x onerror="window.hurt=1">'
CONFIG = """
listen_status 127.0.0.1:0
source_ip 127.0.0.0/8, 192.0.2.8
throttle everyone {
    max_concurrent_connections 50
}
"""


@pytest.fixture(scope="module")
def proxy():
    """One with trouble of each kind: a receiver that says 421, a source that is not here, somebody who waits."""
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(Proxy(CONFIG))
        refuses = stack.enter_context(Mx({"greeting": say(b"421 4.7.0 try <later>\r\n", close)}, host="127.0.3.1"))
        greets = stack.enter_context(Raw(greet))
        for _ in range(3):
            with socks5(own.socks5, refuses.endpoint, SOURCE) as sock:
                sock.recv(100)
        with pytest.raises(Refused):
            socks5(own.socks5, greets.endpoint, "192.0.2.8")
        for name in ("server-a", "server-b", HOSTILE):
            session = stack.enter_context(Session(own.native, SECRET, name))
            for limit in (Limits("yahoo", [(5, 60), (3600, 3600)], 3, mode="sum"), Limits("narrow", (), 1)):
                throttle = session.throttle(SOURCE, limit)
                assert throttle.wait_until_registered(30)
        first = stack.enter_context(session.connect([greets.endpoint], source_ip=SOURCE, throttles=[throttle]))
        assert first.recv(8)
        waiting = threading.Thread(target=_ask, args=(session, greets.endpoint, throttle))
        waiting.start()
        stack.callback(waiting.join, 20)
        stack.callback(first.close)
        wait_for(lambda: [row for row in view(own)["throttles"] if row["waiting"]], what="one that waits")
        yield own


def _ask(session, endpoint, throttle):
    session.connect([endpoint], source_ip=SOURCE, throttles=[throttle]).close()


@pytest.fixture(scope="module")
def browser():
    with Browser() as it:
        yield it


@pytest.fixture
def page(proxy, browser):
    """The page on a desk, just opened."""
    browser.look(1280)
    browser.open(url(proxy))
    return browser


def url(proxy, query=""):
    return "http://{}:{}/{}".format(*proxy.door("status"), query)


def get(proxy, path, method="GET", **headers):
    connection = http.client.HTTPConnection(*proxy.door("status"), timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return dict(answer.getheaders()), answer.read()


def view(proxy):
    return json.loads(get(proxy, "/status.json")[1])


def refresh(browser, until):
    """Let the script refresh the page until the expression is true in it."""
    ask = f"document.dispatchEvent(new Event('visibilitychange')); !!({until})"
    wait_for(lambda: browser.run(ask), timeout=30, what=until, pause=lambda _: time.sleep(0.1))


# -- looked at


@pytest.mark.parametrize("dark", [False, True], ids=["day", "night"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_has_nothing_to_say(proxy, browser, width, dark, tmp_path):
    if not AXE.exists():
        missing("axe-core is not there: run tests/fetch_node_peers.sh")
    browser.look(width, dark)
    browser.open(url(proxy))
    browser.picture(tmp_path / f"page-{width}-{'dark' if dark else 'light'}.png")
    assert browser.run("matchMedia('(prefers-color-scheme: dark)').matches") is dark
    browser.run(AXE.read_text() + ";0")
    found = browser.run("axe.run()")
    assert [(rule["id"], rule["nodes"][0]["html"]) for rule in found["violations"]] == []
    assert {"color-contrast", "region", "scrollable-region-focusable"} <= {rule["id"] for rule in found["passes"]}
    # It cannot judge the colours of what is scrolled out of sight.
    browser.look(3000, dark)
    found = browser.run("axe.run({runOnly: ['color-contrast']})")
    assert [node["html"] for rule in found["violations"] + found["incomplete"] for node in rule["nodes"]] == []


@pytest.mark.parametrize("width", [1280, 390])
def test_the_last_hour_too(proxy, browser, width, tmp_path):
    """Of a program that has run so long, as a file."""
    if not AXE.exists():
        missing("axe-core is not there: run tests/fetch_node_peers.sh")
    shown = msgspec.json.decode(get(proxy, "/status.json")[1], type=Status)
    shown.minutes = [MinuteRow(minute % 7 + 1.5, minute % 5 / 10, 0.002) for minute in range(60)]
    (tmp_path / "page.html").write_text("".join(pieces(shown)))
    browser.look(width, dark=True)
    browser.open(f"file://{tmp_path}/page.html")
    browser.picture(tmp_path / f"hour-{width}.png")
    assert browser.run("[...document.querySelectorAll('svg')].every(svg => svg.getBoundingClientRect().height > 20)")
    assert browser.run("document.documentElement.scrollWidth") == width
    browser.run(AXE.read_text() + ";0")
    assert [rule["id"] for rule in browser.run("axe.run()")["violations"]] == []


def test_a_telephone_shows_what_matters_without_scrolling_sideways(proxy, browser):
    browser.look(390)
    browser.open(url(proxy))
    assert browser.run("document.documentElement.scrollWidth") == 390
    seen = browser.run(
        "[...document.querySelectorAll('[aria-labelledby=throttles] thead th')]"
        ".filter(cell => cell.getBoundingClientRect().right <= 390).map(cell => cell.textContent)"
    )
    assert seen[:4] == ["throttle", "held by", "waiting", "places"]


def test_who_waits_is_told_with_what_holds_it(page):
    cells = page.run("[...document.querySelector('tbody tr').cells].map(cell => cell.innerText)")
    assert cells[:4] == [f"narrow\n{SOURCE}", "places", "1", "1 of 1"]


def test_names_do_not_become_markup(page):
    assert page.run("document.body.innerText").count(HOSTILE) >= 2
    assert page.run("document.images.length + (window.hurt || 0)") == 0


# -- kept up to date


def test_scrolling_selection_and_what_is_typed_survive_a_refresh(proxy, browser):
    browser.look(390, height=500)
    browser.open(url(proxy))
    browser.run(
        """{
        const region = document.querySelector('.s'), head = [...document.querySelectorAll('th b')].find(
            node => node.textContent === 'yahoo');
        window.region = region; window.head = head; window.was = document.querySelector('.f').textContent;
        region.scrollLeft = 70; window.scrollTo(0, 300); document.querySelector('#q').value = 'half a na';
        getSelection().setBaseAndExtent(head.firstChild, 1, head.firstChild, 4); 0
        }"""
    )
    refresh(browser, "document.querySelector('.f').textContent !== window.was")
    seen = browser.run(
        "[scrollY, region.scrollLeft, region.isConnected, head.isConnected, String(getSelection()), q.value]"
    )
    assert seen == [300, 70, True, True, "aho", "half a na"]


def test_a_row_stays_itself_when_it_moves(proxy, page):
    """What was marked is still marked when others have come before it."""
    page.run(
        "window.row = [...document.querySelectorAll('tbody tr')].find(row => row.cells[0].textContent === 'server-b');"
        "getSelection().selectAllChildren(row.cells[0]); window.index = row.rowIndex"
    )
    with Session(proxy.native, SECRET, "server-aa") as session:
        throttle = session.throttle(SOURCE, Limits("narrow", (), 1))
        assert throttle.wait_until_registered(30)
        refresh(page, "row.rowIndex !== window.index")
        assert page.run("[row.isConnected, row.cells[0].textContent, String(getSelection()).trim()]") == [
            *(True, "server-b", "server-b")
        ]
    names = "[...document.querySelectorAll('tbody th')].map(th => th.textContent)"
    listed = page.run(names)
    page.open(url(proxy))
    assert [name for name in listed if name != "server-aa"] == [n for n in page.run(names) if n != "server-aa"]


def test_what_is_looked_for_stays_looked_for(proxy, browser):
    browser.look(1280)
    browser.open(url(proxy, "?q=NARROW"))
    assert browser.run("q.value") == "NARROW"
    browser.run("window.was = document.querySelector('.f').textContent")
    refresh(browser, "document.querySelector('.f').textContent !== window.was")
    names = browser.run("[...document.querySelectorAll('[aria-labelledby=throttles] th b')].map(b => b.textContent)")
    assert names == ["narrow"]


def test_the_policy_lets_its_own_script_run_and_no_other(page):
    page.run("window.was = document.querySelector('.f').textContent")
    refresh(page, "document.querySelector('.f').textContent !== window.was")
    assert [event for event in page.events if event["method"] == "Log.entryAdded"] == []
    page.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hurt=1'}))")
    assert page.run("window.hurt || 0") == 0


def test_a_page_that_gets_no_answer_says_so_and_recovers_nothing(browser):
    with Proxy("listen_status 127.0.0.1:0\n") as own:
        browser.look(1280)
        browser.open(url(own))
    refresh(browser, "live.textContent.startsWith('No answer for ')")


def test_without_scripts_it_loads_itself_anew(proxy, browser):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(url(proxy, "?q=narrow"))
        browser.events.clear()
        browser.wait("Page.loadEventFired")
        told = browser.call("Page.getNavigationHistory")
        assert told["entries"][told["currentIndex"]]["url"] == url(proxy, "?q=narrow")
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
        browser.open("about:blank")


# -- sent


@pytest.mark.parametrize("path", ["/", "/status.json", "/?q=yahoo"])
def test_gzip_for_those_who_take_it(proxy, path):
    headers, body = get(proxy, path, Accept_Encoding="br, gzip")
    assert (headers["Content-Encoding"], headers["Vary"]) == ("gzip", "Accept-Encoding")
    assert int(headers["Content-Length"]) == len(body)
    plain, whole = get(proxy, path, Accept_Encoding="identity")
    assert "Content-Encoding" not in plain
    assert plain["Vary"] == "Accept-Encoding"
    assert int(plain["Content-Length"]) == len(whole)
    assert len(body) < len(whole) / 2
    assert gzip.decompress(body)[:200] == whole[:200]


@pytest.mark.parametrize("path", ["/", "/status.json"])
def test_head_tells_the_length_of_what_get_sends(proxy, path):
    for accepted in ("gzip", "identity"):
        wait_for(lambda accepted=accepted: _lengths(proxy, path, accepted), what="two of the same view")


def _lengths(proxy, path, accepted):
    """Whether HEAD and two GETs around it say the same; they may be of different views."""
    before, body = get(proxy, path, Accept_Encoding=accepted)
    head, nothing = get(proxy, path, "HEAD", Accept_Encoding=accepted)
    assert nothing == b""
    assert head.get("Content-Encoding") == before.get("Content-Encoding")
    return head["Content-Length"] == before["Content-Length"] == str(len(body))


@pytest.mark.parametrize(
    ("accepted", "packed"),
    [("gzip;q=0", False), ("*", True), ("*;q=0", False), ("GZIP; q=0.5", True), ("gzip;q=0, *", False), ("", False)],
)
def test_weights_of_encodings(proxy, accepted, packed):
    headers, _ = get(proxy, "/", Accept_Encoding=accepted)
    assert (headers.get("Content-Encoding") == "gzip") is packed


def test_what_is_looked_for_is_escaped_and_bounded(proxy):
    _, body = get(proxy, "/?q=%22%3E%3Cscript%3Ealert(1)%3C/script%3E" + "y" * 5000)
    assert b"<script>alert" not in body
    assert b'value="&quot;&gt;&lt;script&gt;alert(1)&lt;/script&gt;yyy' in body
    assert b"y" * 100 not in body
    for odd in ("/?q=%ff%fe%00", "/?q", "/?q=&q=x", "/?" + "&" * 2000, "/?q=%E2%80%AE"):
        _, body = get(proxy, odd)
        assert body.endswith(b"</html>\n")
        assert b"\x00" not in body


def test_a_page_of_seven_hundred_throttles_is_small_and_any_of_them_can_be_looked_for():
    with Proxy("listen_status 127.0.0.1:0\n") as own, Session(own.native, SECRET, "server-many") as session:
        limits = [Limits(f"rule-{number:03}", [(5, 60), (3600, 3600)], 3) for number in range(700)]
        throttles = [session.throttle(SOURCE, each) for each in limits]
        assert all(throttle.wait_until_registered(30) for throttle in throttles)
        wait_for(lambda: view(own)["throttles_left_out"] == 200, what="all are known")
        _, whole = get(own, "/")
        assert len(whole) < 150_000
        assert b"<p>575 more are not shown; they can be looked for by name.</p>" in whole
        listed = {row["name"] for row in view(own)["throttles"]}
        hidden = next(each.name for each in limits if each.name not in listed)
        for wanted, names in ((hidden.upper(), {hidden}), ("rule-69", {f"rule-69{n}" for n in range(10)})):
            _, body = get(own, f"/?q={wanted}")
            assert set(re.findall(r"<b>(rule-\d+)</b>", body.decode())) == names
            assert b"are not shown" not in body
        assert {row["name"] for row in view(own)["throttles"]} == listed, "the JSON is what it was"
