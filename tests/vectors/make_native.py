"""Makes native.json, the byte-exact examples of the native protocol, from docs/protocol.md and nothing else.

It shares no code with the program: MessagePack is written out by hand here, so that the vectors check the codec and not
themselves. Run it as `python tests/vectors/make_native.py` after the document has changed; `--document` prints the
annotated blocks for docs/protocol.md instead. A test fails when document, vectors and code differ.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
import sys
from pathlib import Path

SECRET = b"00000000000000000000000000000000"
OLD_SECRET = b"an older secret, still accepted: 32+"
DER = b"stands for the DER form of the leaf certificate"
CERT = hashlib.sha256(DER).digest()
RUN_ID = bytes(range(0x10, 0x20))
CLIENT_NONCE = bytes(range(0x20, 0x40))
SERVER_NONCE = bytes(range(0x80, 0xA0))
KEY_ID = bytes(range(0xA0, 0xA8))
KEY = bytes(range(0xC0, 0xE0))
INCARNATION = 0x0543B19C
#: Throttles as REG carries them, and what a path may say of its source and its receivers by name.
RULE = ["yahoo", [[1000, 3600, 0]], 20, "average", False, [50, None, 1800, 30], "cluster"]
PLAIN = ["yahoo", [[1000, 3600, 0]], 0, "average", False, None, "proxy"]
PATH_NAMES = ["vmta7", "mx1.example.net", "example.net"]
SOFTWARE = "example/1.0"


def pack(value: object) -> bytes:
    """MessagePack, shortest forms, only what the protocol uses."""
    if value is None:
        return b"\xc0"
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        if value < 0:
            if value >= -32:
                return struct.pack(">b", value)
            return b"\xd1" + struct.pack(">h", value) if value >= -(2**15) else b"\xd2" + struct.pack(">i", value)
        if value < 0x80:
            return bytes((value,))
        for limit, code, form in ((8, 0xCC, ">B"), (16, 0xCD, ">H"), (32, 0xCE, ">I"), (64, 0xCF, ">Q")):
            if value < 1 << limit:
                return bytes((code,)) + struct.pack(form, value)
    if isinstance(value, str):
        data = value.encode()
        return (bytes((0xA0 | len(data),)) if len(data) < 32 else bytes((0xD9, len(data)))) + data
    if isinstance(value, bytes):
        return bytes((0xC4, len(value))) + value
    assert isinstance(value, list)
    return array(value) + b"".join(map(pack, value))


def array(values: list[object]) -> bytes:
    """What stands before an array's elements."""
    return bytes((0x90 | len(values),)) if len(values) < 16 else b"\xdc" + struct.pack(">H", len(values))


def frame(kind: int, payload: bytes) -> bytes:
    return struct.pack(">IB", len(payload), kind) + payload


def mac(secret: bytes, *parts: bytes) -> bytes:
    return hmac.new(secret, b"".join(parts), hashlib.sha256).digest()


class Maker:
    def __init__(self) -> None:
        self.messages: list[dict[str, object]] = []
        self.blocks: dict[str, str] = {}

    def message(self, name: str, kind: str, number: int, /, **fields: object) -> bytes:
        """A frame of type `kind` whose payload is the array of the fields in order."""
        values = list(fields.values())
        data = frame(number, pack(values))
        self.messages.append({"name": name, "type": kind, "hex": data.hex(), "fields": plain(fields)})
        lines = [(data[:4], "length"), (data[4:5], f"type {kind}"), (array(values), "array")]
        lines += [(pack(value), key) for key, value in fields.items()]
        self.blocks[name] = block(name, lines)
        return data

    def raw(self, name: str, data: bytes, *lines: tuple[bytes, str]) -> None:
        self.messages.append({"name": name, "type": "DATA", "hex": data.hex(), "fields": {}})
        self.blocks[name] = block(name, list(lines))


def plain(value: object) -> object:
    """JSON form: bytes as {"hex": …}."""
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return value


def block(name: str, lines: list[tuple[bytes, str]]) -> str:
    """The annotated form for the document: at most 24 bytes a line, the field's name behind the first."""
    out = []
    for data, note in lines:
        rows = [data[at : at + 24] for at in range(0, len(data), 24)]
        out.append(f"{rows[0].hex(' '):<71}  # {note}")
        out += [row.hex(" ") for row in rows[1:]]
    return "\n".join([f"```hex {name}", *out, "```"])


def handshake(maker: Maker) -> list[dict[str, object]]:
    hello = maker.message(
        "hello",
        "HELLO",
        0x01,
        kind=1,
        min_version=1,
        max_version=1,
        instance="server-a",
        run_id=RUN_ID,
        nonce=CLIENT_NONCE,
    )
    challenge = maker.message("challenge", "CHALLENGE", 0x02, version=1, nonce=SERVER_NONCE)
    exchanges = []
    for name, secret, cert in (
        ("tls", SECRET, CERT),
        ("tls-older-secret", OLD_SECRET, CERT),
        ("no-tls", SECRET, bytes(32)),
    ):
        transcript = cert + hello + challenge
        client_proof = mac(secret, b"greenarrow-proxy/1 client\0", transcript)
        auth = frame(0x03, pack([client_proof]))
        server_proof = mac(secret, b"greenarrow-proxy/1 server\0", transcript, auth)
        exchanges.append(
            {
                "name": name,
                "secret": secret.decode(),
                "certificate_sha256": cert.hex(),
                "hello": hello.hex(),
                "challenge": challenge.hex(),
                "auth": auth.hex(),
                "client_proof": client_proof.hex(),
                "server_proof": server_proof.hex(),
            }
        )
        if name == "tls":
            maker.message("auth", "AUTH", 0x03, proof=client_proof)
            maker.message(
                "welcome",
                "WELCOME",
                0x04,
                proof=server_proof,
                incarnation=INCARNATION,
                key_id=KEY_ID,
                key=KEY,
                reuse_max_idle_ms=30000,
                software=SOFTWARE,
            )
    proof = mac(KEY, b"greenarrow-proxy/1 channel\0", CERT, b"\x01", KEY_ID, struct.pack(">Q", 1))
    maker.message("channel-auth", "CHANNEL_AUTH", 0x05, version=1, key_id=KEY_ID, counter=1, proof=proof)
    maker.message(
        "error-credentials",
        "ERROR",
        0x06,
        code="bad_credentials",
        message="unknown instance or wrong secret",
        retry=False,
        retry_after_ms=0,
    )
    maker.message("goaway", "GOAWAY", 0x07, deadline_ms=60000, reason="shutting down", code="draining")
    return exchanges


def channel(maker: Maker) -> None:
    maker.message(
        "open",
        "OPEN",
        0x10,
        source_ip="192.0.2.1",
        destinations=[["198.51.100.7", 25], ["198.51.100.8", 25]],
        ehlo_name="mta.example.com",
        tls="opportunistic",
        tls_server_name="mx.example.net",
        tls_verify=False,
        reuse=True,
        throttles=[7],
        deadline_ms=50000,
        smtputf8=False,
        requiretls=False,
        tenant=None,
        fresh=False,
        dialogue=False,
        source=None,
        mx="mx1.example.net",
        domain="example.net",
        tls_names=[],
        tlsa=[[3, 1, 1, hashlib.sha256(b"stands for the public key").digest()]],
        tls_min="",
        tls_ciphers="",
        probes=True,
    )
    maker.message("open-raw", "OPEN", 0x10, source_ip=None, destinations=[["2001:db8::25", 25]])
    maker.message(
        "opened",
        "OPENED",
        0x11,
        reused=True,
        destination=["198.51.100.7", 25],
        local=["192.0.2.1", 40112],
        messages=3,
        age_ms=41250,
        greeting=b"220 mx.example.net ESMTP",
        ehlo=[b"mx.example.net", b"SIZE 52428800", b"8BITMIME"],
        tls=["TLSv1.3", "TLS_AES_256_GCM_SHA384", True, "ok", DER, "", "dane", "EC secp256r1", "CN=mx", []],
        attempts=[],
        tls_failure="",
        tls_result="",
    )
    maker.message(
        "opened-raw",
        "OPENED",
        0x11,
        reused=False,
        destination=["2001:db8::25", 25],
        local=["2001:db8::1", 40113],
        messages=0,
        age_ms=0,
        greeting=None,
        ehlo=[],
        tls=None,
        attempts=[],
        tls_failure="",
        tls_result="",
    )
    maker.message(
        "opened-in-clear",
        "OPENED",
        0x11,
        reused=False,
        destination=["198.51.100.8", 25],
        local=["192.0.2.1", 40114],
        messages=0,
        age_ms=310,
        greeting=b"220 mx2.example.net ESMTP",
        ehlo=[b"mx2.example.net", b"STARTTLS"],
        tls=None,
        attempts=[[["198.51.100.7", 25], "connect", 110, None, "connection timed out", ""]],
        tls_failure="TLS handshake failed: NO_SHARED_CIPHER",
        tls_result="validation-failure",
    )
    maker.message(
        "failed",
        "FAILED",
        0x12,
        step="connect",
        code="upstream_failed",
        message="connect to 198.51.100.8:25: connection refused",
        errno=111,
        smtp_reply=None,
        retry=True,
        retry_after_ms=0,
        throttle=None,
        attempts=[
            [["198.51.100.7", 25], "greeting", 0, b"421 4.3.2 busy", "greeting 421", ""],
            [["198.51.100.8", 25], "connect", 111, None, "connection refused", ""],
        ],
        tls_result="",
    )
    maker.message(
        "failed-throttle",
        "FAILED",
        0x12,
        step="throttle",
        code="throttled",
        message="no place under yahoo in time",
        errno=0,
        smtp_reply=None,
        retry=True,
        retry_after_ms=2500,
        throttle="yahoo",
        attempts=[],
        tls_result="",
    )
    text = b"MAIL FROM:<a@example.com>\r\n"
    data = frame(0x13, text)
    maker.raw("data", data, (data[:4], "length"), (data[4:5], "type DATA"), (text, "raw bytes, no MessagePack"))
    maker.message("eof", "EOF", 0x14)
    maker.message("aborted", "ABORTED", 0x15, code="upstream_failed", errno=104, message="connection reset by peer")
    maker.message("end", "END", 0x16, keep=True, messages=1, quit=False)
    maker.message("ended", "ENDED", 0x17, kept=True, reason="kept")
    maker.message("probe", "PROBE", 0x18)


def session(maker: Maker) -> None:
    inc = {"incarnation": INCARNATION}
    maker.message("ping", "PING", 0x20, **inc, t=123456789012)
    maker.message("pong", "PONG", 0x21, **inc, t=123456789012, hold_us=40)
    maker.message("cert", "CERT", 0x22, **inc, hashes=[CERT])
    maker.message("reg", "REG", 0x23, **inc, paths=[[7, "192.0.2.1", [RULE], None, None, None]])
    maker.message("reg-named", "REG", 0x23, **inc, paths=[[8, None, [PLAIN], *PATH_NAMES]])
    maker.message("demand", "DEMAND", 0x24, **inc, records=[[7, 120, 45, 100, 0, 20, 3]])
    maker.message("return", "RETURN", 0x25, **inc, records=[[7, 43, 2]])
    maker.message("outcome", "OUTCOME", 0x26, **inc, records=[[7, 41, 2, 0, False]])
    maker.message("bye", "BYE", 0x27, **inc)
    maker.message(
        "grant",
        "GRANT",
        0x28,
        **inc,
        ping_t=123456789012,
        hold_us=250000,
        records=[[7, 2, 1500, 3600, 123459040512], [9, 1, -800, 0, 123457138212]],
    )
    maker.message("cap", "CAP", 0x29, **inc, records=[[7, 6]])
    maker.message("limit", "LIMIT", 0x2A, **inc, records=[[7, [[[[1000, 3600, 1]], 20]], 2000000, 0, False, ""]])
    maker.message("list", "LIST", 0x2B, **inc, source_ip="192.0.2.1")
    entry = ["192.0.2.1", ["198.51.100.7", 25], "mta.example.com", "opportunistic", 2]
    maker.message("cached", "CACHED", 0x2C, **inc, entries=[entry], more=False)


def lenient() -> list[dict[str, object]]:
    """Frames that are not what an encoder of today sends, and must be understood all the same."""
    end = pack([True, 1, False])
    return [
        {"name": "an appended field is ignored", "table": "CHANNEL_FROM_CLIENT", "like": "end",
         "hex": frame(0x16, b"\x94" + end[1:] + pack(["later", [1, None]])).hex()},
        {"name": "an integer in a longer form", "table": "CHANNEL_FROM_CLIENT", "like": "end",
         "hex": frame(0x16, b"\x92\xc3\xd3" + struct.pack(">q", 1)).hex()},
        {"name": "an array in a longer form", "table": "CHANNEL_FROM_CLIENT", "like": "end",
         "hex": frame(0x16, b"\xdc\x00\x03" + end[1:]).hex()},
        {"name": "a string in a longer form", "table": "CHANNEL_FROM_PROXY", "like": "ended",
         "hex": frame(0x17, b"\x92\xc3\xda\x00\x04kept").hex()},
        {"name": "a path without what may be left out", "table": "SESSION_FROM_CLIENT", "like": "reg",
         "hex": frame(0x23, pack([INCARNATION, [[7, "192.0.2.1", [RULE]]]])).hex()},
        {"name": "a throttle without what may be left out", "table": "SESSION_FROM_CLIENT", "like": "reg-named",
         "hex": frame(0x23, pack([INCARNATION, [[8, None, [PLAIN[:2]], *PATH_NAMES]]])).hex()},
    ]  # fmt: skip


def invalid() -> list[dict[str, str]]:
    """Frames that must be refused; each breaks one rule."""
    good = ["192.0.2.1", [["198.51.100.7", 25]], "mta.example.com", "none", None, False, True, [], 1000]

    def opened(at: int, value: object) -> bytes:
        return frame(0x10, pack([*good[:at], value, *good[at + 1 :]]))

    to_proxy = {
        "longer than a frame may be": struct.pack(">IB", 65537, 0x10),
        "length of 4 GB": struct.pack(">IB", 2**32 - 1, 0x10),
        "unknown frame type": frame(0x7F, pack([])),
        "a frame of the other direction": frame(0x11, pack([])),
        "a probe of the client's": frame(0x18, pack([])),
        "integer for probes": frame(
            0x10, pack([*good, *[False] * 2, None, *[False] * 2, *[None] * 3, [], [], "", "", 1])
        ),
        "a frame of a session on a channel": frame(0x20, pack([INCARNATION, 1])),
        "DATA without a byte": frame(0x13, b""),
        "no payload": frame(0x16, b""),
        "payload is not an array": frame(0x16, b"\x81\xa4keep\xc3"),
        "a required field is missing": frame(0x16, pack([])),
        "bytes behind the array": frame(0x16, pack([True, 1]) + b"\0"),
        "array longer than the payload": frame(0x16, b"\xdd\xff\xff\xff\xff\xc3"),
        "reserved MessagePack code": frame(0x16, b"\x91\xc1"),
        "nested too deeply": frame(0x16, b"\x93\xc3\x01" + b"\x91" * 5000),
        "not UTF-8": frame(0x10, b"\x92\xa2\xff\xfe\x91\x92\xa98.8.8.8.8\x19"),
        "integer for a boolean": frame(0x16, pack([1, 1])),
        "negative count": frame(0x16, pack([True, -1])),
        "count above 32 bits": frame(0x16, pack([True, 2**32])),
        "boolean for an integer": frame(0x16, pack([True, True])),
        "source is no IP address": opened(0, "mta.example.com"),
        "source with a zone": opened(0, "fe80::1%eth0"),
        "no destination": opened(1, []),
        "too many destinations": frame(0x10, b"\x92\xc0\xdc\x00\x21" + pack(["198.51.100.7", 25]) * 33),
        "destination is a host name": opened(1, [["mx.example.net", 25]]),
        "port 0": opened(1, [["198.51.100.7", 0]]),
        "port 65536": opened(1, [["198.51.100.7", 65536]]),
        "EHLO name with a line break": opened(2, "mta.example.com\r\nMAIL FROM:<>"),
        "EHLO name ends with a line feed": opened(2, "mta.example.com\n"),
        "EHLO name with a space": opened(2, "mta example"),
        "empty EHLO name": opened(2, ""),
        "unknown TLS mode": opened(3, "always"),
        "TLS without EHLO name": frame(0x10, pack([None, good[1], None, "required"])),
        "path id above 32 bits": opened(7, [2**32]),
        "deadline 0": opened(8, 0),
        "deadline above ten minutes": opened(8, 600001),
    }
    rows = [{"name": name, "table": "CHANNEL_FROM_CLIENT", "hex": data.hex()} for name, data in to_proxy.items()]
    hello = [1, 1, 1, "server-a", RUN_ID, CLIENT_NONCE]
    first = {
        "unknown kind of connection": [3, *hello[1:]],
        "version 0": [1, 0, *hello[2:]],
        "empty instance name": [*hello[:3], "", *hello[4:]],
        "instance name with a control character": [*hello[:3], "server\x1b[2J", *hello[4:]],
        "instance name ends with a line feed": [*hello[:3], "server-a\n", *hello[4:]],
        "instance name too long": [*hello[:3], "n" * 65, *hello[4:]],
        "run id too short": [*hello[:4], RUN_ID[:15], CLIENT_NONCE],
        "nonce too short": [*hello[:5], CLIENT_NONCE[:31]],
        "nonce as a string": [*hello[:5], "n" * 32],
    }
    rows += [{"name": name, "table": "FIRST", "hex": frame(0x01, pack(data)).hex()} for name, data in first.items()]
    grants = {
        "no record": [INCARNATION, 1, 1, []],
        "record with no slot": [INCARNATION, 1, 1, [[7, 0, 1, 1]]],
        "offset out of range": [INCARNATION, 1, 1, [[7, 1, 2**31, 1]]],
        "clock above 63 bits": [INCARNATION, 2**63, 1, [[7, 1, 1, 1]]],
    }
    rows += [
        {"name": f"grant: {name}", "table": "SESSION_FROM_PROXY", "hex": frame(0x28, pack(data)).hex()}
        for name, data in grants.items()
    ]
    table = "SESSION_FROM_CLIENT"
    return rows + [{"name": name, "table": table, "hex": data.hex()} for name, data in to_control().items()]


def to_control() -> dict[str, bytes]:
    """Frames of a session that the proxy must refuse."""
    rule = RULE

    def reg(at: int, value: object) -> bytes:
        return frame(0x23, pack([INCARNATION, [[7, "192.0.2.1", [[*rule[:at], value, *rule[at + 1 :]]]]]]))

    def path(*fields: object) -> bytes:
        return frame(0x23, pack([INCARNATION, [list(fields)]]))

    return {
        "a frame of a channel on a session": frame(0x16, pack([True, 1])),
        "a frame of the proxy": frame(0x28, pack([INCARNATION, 1, 1, [[7, 1, 1, 1]]])),
        "DATA on a session": frame(0x13, b"x"),
        "ping: no time": frame(0x20, pack([INCARNATION])),
        "ping: clock above 63 bits": frame(0x20, pack([INCARNATION, 2**63])),
        "ping: negative clock": frame(0x20, pack([INCARNATION, -1])),
        "pong: held for more than 32 bits": frame(0x21, pack([INCARNATION, 1, 2**32])),
        "reg: no path": frame(0x23, pack([INCARNATION, []])),
        "reg: no throttle": path(7, "192.0.2.1", []),
        "reg: nine throttles": path(7, "192.0.2.1", [[f"t{number}", []] for number in range(9)]),
        "reg: source is no IP address": path(7, "mta.example.com", [rule]),
        "reg: neither source_ip nor source": path(7, None, [rule]),
        "reg: source_ip and source": path(7, "192.0.2.1", [rule], "vmta7"),
        "reg: source that is no name": path(7, None, [rule], "vmta 7\n"),
        "reg: empty mx": path(7, "192.0.2.1", [rule], None, ""),
        "reg: integer for domain": path(7, "192.0.2.1", [rule], None, None, 7),
        "reg: id above 32 bits": path(2**32, "192.0.2.1", [rule]),
        "reg: empty name": reg(0, ""),
        "reg: name with a control character": reg(0, "yahoo\n"),
        "reg: five rates": reg(1, [[1, seconds, 0] for seconds in (1, 2, 3, 4, 5)]),
        "reg: window of 0 s": reg(1, [[1000, 0, 0]]),
        "reg: window above 31 days": reg(1, [[1000, 2_678_401, 0]]),
        "reg: amount above 32 bits": reg(1, [[2**32, 3600, 0]]),
        "reg: unknown mode": reg(3, "minimum"),
        "reg: backoff of 0 percent": reg(5, [0, None, 1800, 30]),
        "reg: backoff that never ends": reg(5, [50, None, 0, 30]),
        "demand: no record": frame(0x24, pack([INCARNATION, []])),
        "demand: negative": frame(0x24, pack([INCARNATION, [[7, -1, 0]]])),
        "demand: no got_cum": frame(0x24, pack([INCARNATION, [[7, 1]]])),
        "return: no permit": frame(0x25, pack([INCARNATION, [[7, 43, 0]]])),
        "outcome: integer for backoff": frame(0x26, pack([INCARNATION, [[7, 41, 2, 0, 1]]])),
        "bye: no incarnation": frame(0x27, pack([])),
        "list: source is no IP address": frame(0x2B, pack([INCARNATION, "x"])),
    }


def counters() -> list[dict[str, object]]:
    """CHANNEL_AUTH counters in the order in which they come with a right proof, and whether each is accepted."""
    return [
        {"name": "each once", "steps": [[1, True], [1, False], [2, True], [1, False], [2, False], [3, True]]},
        {"name": "out of order", "steps": [[5, True], [3, True], [4, True], [3, False], [1, True], [5, False]]},
        {"name": "1,023 below the highest", "steps": [[2000, True], [977, True], [976, False], [977, False]]},
        {"name": "what the highest leaves behind", "steps": [[1, True], [1025, True], [1, False], [2, True]]},
        {"name": "a leap", "steps": [[1, True], [2**63 - 1, True], [2**63 - 2, True], [2, False], [2**63 - 1, False]]},
    ]  # fmt: skip


def sequences() -> list[dict[str, object]]:
    """What a client does about one path, id 7: see section 12 of the document for the steps."""

    def receive(at: int, kind: int, *fields: object) -> dict[str, object]:
        return {"at_us": at, "receive": frame(kind, pack([INCARNATION, *fields])).hex()}

    def limit(at: int, slack: int) -> dict[str, object]:
        return receive(at, 0x2A, [[7, [[[[1000, 3600, 1]], 20]], slack, 0, False, ""]])

    def grant(at: int, ping_t: int, hold: int, *records: list[object]) -> dict[str, object]:
        return receive(at, 0x28, ping_t, hold, [[7, *record] for record in records])

    def ready(at: int, want: int, due: int | None, got: int = 0, lapsed: int = 0) -> dict[str, object]:
        """So many messages wait without a permit; the DEMAND that follows, and when."""
        demand = frame(0x24, pack([INCARNATION, [[7, want, got % 2**32, 0, 0, 0, lapsed]]])).hex()
        return {"at_us": at, "ready": want, "due_us": due, "demand": None if due is None else demand}

    def permits(at: int, *spans: list[int]) -> dict[str, object]:
        return {"at_us": at, "permits": list(spans)}

    pinged, held = 1_000_000, 20_000
    two = [2, 10_000, 5_000, 1_130_000]
    spans = [1_035_000, 1_130_000], [1_040_000, 1_135_000]
    return [
        {"name": "use by", "steps": [
            limit(1_000_000, 100_000), grant(1_025_000, pinged, held, two),
            permits(1_025_000, *spans), permits(1_130_000, *spans), permits(1_130_001, spans[1]), permits(1_135_001)]},
        {"name": "use by, from a proxy that does not say it", "steps": [
            limit(1_000_000, 100_000), grant(1_025_000, pinged, held, two[:3]), permits(1_025_000, *spans)]},
        {"name": "use by, without a limit", "steps": [
            grant(1_025_000, pinged, held, two), permits(1_025_000, *spans)]},
        {"name": "a burst", "steps": [
            grant(1_000, 1_000, 0, [3, 0, 0, 101_000]), permits(1_000, *[[1_000, 101_000]] * 3), permits(101_001)]},
        {"name": "a link that stalled for 300 ms voids a grant", "steps": [
            limit(1_000_000, 100_000), ready(1_000_000, 2, 1_000_000), grant(1_325_000, pinged, held, two),
            permits(1_325_000), ready(1_325_000, 2, 1_325_000, 2, 2)]},
        {"name": "got_cum counts what was void", "steps": [
            limit(1_000_000, 100_000), ready(1_000_000, 10, 1_000_000),
            grant(1_010_000, pinged, 0, [4, 0, 1_000, 1_100_000]), ready(1_010_000, 6, None),
            grant(1_060_000, pinged, 0, [4, -50_000, 1_000, 1_050_000]), ready(1_060_000, 6, 1_060_000, 8, 4)]},
        {"name": "a demand that changes", "steps": [
            ready(1_000_000, 100, 1_000_000), ready(1_001_000, 120, None), ready(1_002_000, 126, 1_010_000),
            ready(1_010_000, 126, 1_010_000), ready(1_011_000, 0, 1_011_000), ready(1_012_000, 1, 1_012_000)]},
        {"name": "without a limit all is granted, and the count goes on from 0", "steps": [
            ready(1_000_000, 9, 1_000_000), grant(1_000_000, 1_000_000, 0, [2**32 - 1, 0, 0, 3_000_000]),
            ready(4_000_000, 9, 4_000_000, 2**32 - 1, 2**32 - 1),
            grant(4_000_000, 4_000_000, 0, [5, 0, 0, 4_100_000]), ready(4_000_000, 4, None)]},
    ]  # fmt: skip


def dialogues() -> list[dict[str, object]]:
    """What the proxy says to a session, by the proxy's own clock; nothing else limits the throttle."""
    inc = INCARNATION

    def client(at: int, kind: int, *fields: object) -> dict[str, object]:
        return {"at_us": at, "client": frame(kind, pack([inc, *fields])).hex()}

    def proxy(at: int, kind: int, *fields: object) -> dict[str, object]:
        return {"at_us": at, "proxy": frame(kind, pack([inc, *fields])).hex()}

    def limit(at: int, id: int, rates: list[object], slack: int, warning: str = "") -> dict[str, object]:
        return proxy(at, 0x2A, [[id, [[rates, 0]] if not warning else [], slack, 0, False, warning]])

    reg = [[7, "192.0.2.1", [["yahoo", [[10, 1, 0]]]]]]
    large = "burst 10 must be smaller than the amount 10"
    return [
        {"name": "a permit, and no more than a rate allows", "steps": [
            client(0, 0x20, 123_000_000), proxy(0, 0x21, 123_000_000, 0),
            client(0, 0x23, reg), limit(0, 7, [[10, 1, 1]], 100_000),
            client(40_000, 0x24, [[7, 1, 0]]), proxy(40_000, 0x28, 123_000_000, 40_000, [[7, 1, 0, 0, 123_140_000]]),
            client(40_000, 0x24, [[7, 0, 1]])]},
        {"name": "no limit", "steps": [
            client(0, 0x20, 5_000), proxy(0, 0x21, 5_000, 0),
            client(0, 0x23, [[7, "192.0.2.1", [["yahoo", []]]]]), limit(0, 7, [], 2_000_000),
            client(1_000, 0x24, [[7, 50, 0]]), proxy(1_000, 0x28, 5_000, 1_000, [[7, 50, 0, 0, 2_006_000]])]},
        {"name": "a limit that cannot hold binds nothing", "steps": [
            client(0, 0x20, 5_000), proxy(0, 0x21, 5_000, 0),
            client(0, 0x23, [[7, "192.0.2.1", [["yahoo", [[10, 1, 10]]]]]]), limit(0, 7, [], 0, large),
            client(1_000, 0x24, [[7, 50, 0]])]},
        {"name": "a permit that comes back is given out again", "steps": [
            client(0, 0x20, 5_000), proxy(0, 0x21, 5_000, 0),
            client(0, 0x23, reg), limit(0, 7, [[10, 1, 1]], 100_000),
            client(0, 0x24, [[7, 1, 0]]), proxy(0, 0x28, 5_000, 0, [[7, 1, 0, 0, 105_000]]),
            client(1_000, 0x25, [[7, 0, 1]]), client(1_000, 0x25, [[7, 0, 1]]),
            client(2_000, 0x24, [[7, 1, 1]]), proxy(2_000, 0x28, 5_000, 2_000, [[7, 1, -2_000, 0, 105_000]])]},
    ]  # fmt: skip


def main() -> None:
    maker = Maker()
    exchanges = handshake(maker)
    channel(maker)
    session(maker)
    if "--document" in sys.argv:
        print("\n\n".join(maker.blocks.values()))
        return
    vectors = {
        "constants": {
            "secret": SECRET.decode(),
            "certificate_der": DER.hex(),
            "certificate_sha256": CERT.hex(),
            "run_id": RUN_ID.hex(),
            "client_nonce": CLIENT_NONCE.hex(),
            "server_nonce": SERVER_NONCE.hex(),
            "key_id": KEY_ID.hex(),
            "key": KEY.hex(),
        },
        "exchanges": exchanges,
        "messages": maker.messages,
        "lenient": lenient(),
        "invalid": invalid(),
        "counters": counters(),
        "sequences": sequences(),
        "dialogues": dialogues(),
    }
    path = Path(__file__).with_name("native.json")
    path.write_text(json.dumps(vectors, indent=1, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()
