"""The byte-exact examples: document, vectors and code must say the same."""

import json
import re
from pathlib import Path

import msgspec
import pytest

from proxy import errors
from proxy.errors import PeerError
from proxy.protocols.native import auth
from proxy.protocols.native import frames as native
from proxy.protocols.native import messages as m
from proxy.protocols.native import session_messages as s

ROOT = Path(__file__).resolve().parents[4]
VECTORS = json.loads((ROOT / "tests/vectors/native.json").read_text())
MESSAGES = {vector["name"]: vector for vector in VECTORS["messages"]}
CONTROL = [vector for vector in VECTORS["messages"] if vector["type"] != "DATA"]
TYPES = {
    re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).upper(): kind
    for module in (m, s)
    for kind in vars(module).values()
    if hasattr(kind, "TYPE")
}
TABLES = [getattr(native, name) for name in dir(native) if isinstance(getattr(native, name), dict) and name.isupper()]


def ways(data: bytes):
    """Each vector is fed whole, byte by byte, and with something behind it."""
    yield "whole", [data]
    yield "byte by byte", [data[at : at + 1] for at in range(len(data))]
    yield "trailing", [data + b"\x00\x00\x00\x01\x13!"]


def frames(chunks: list[bytes]) -> list[native.Frame]:
    decoder = native.FrameDecoder()
    out = []
    for chunk in chunks:
        decoder.receive(chunk)
        while (frame := decoder.next_frame()) is not None:
            out.append((frame[0], bytes(frame[1])))
    return out


def plain(value: object) -> object:
    """As the vectors spell values."""
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, m.Message | m.Part):
        return [plain(getattr(value, name)) for name in value.__struct_fields__]
    return value


def table_of(kind: type[m.Message]) -> native.Table:
    return next(table for table in TABLES if kind.TYPE in table)


@pytest.mark.parametrize("vector", CONTROL, ids=lambda vector: vector["name"])
def test_decodes_to_the_fields(vector):
    kind = TYPES[vector["type"]]
    for way, chunks in ways(bytes.fromhex(vector["hex"])):
        message = native.decode(frames(chunks)[0], table_of(kind))
        assert type(message) is kind, way
        for name, value in vector["fields"].items():
            assert plain(getattr(message, name)) == value, (way, name)


#: One leaves out the fields with defaults, as an encoder may; ours writes them.
COMPLETE = [vector for vector in CONTROL if vector["name"] != "open-raw"]


@pytest.mark.parametrize("vector", COMPLETE, ids=lambda vector: vector["name"])
def test_encodes_to_the_bytes(vector):
    kind = TYPES[vector["type"]]
    raw = {
        name: msgspec.convert(unplain(value), type=field.type)
        for field in msgspec.structs.fields(kind)
        for name, value in vector["fields"].items()
        if field.name == name
    }
    assert list(raw) == list(kind.__struct_fields__)
    assert native.encode(kind(**raw)).hex() == vector["hex"]


def unplain(value: object) -> object:
    if isinstance(value, dict):
        return bytes.fromhex(value["hex"])
    if isinstance(value, list):
        return [unplain(part) for part in value]
    return value


def test_data():
    data = bytes.fromhex(MESSAGES["data"]["hex"])
    assert native.encode_data(data[5:]) == data
    for way, chunks in ways(data):
        pieces = frames(chunks)
        assert {kind for kind, _ in pieces} == {native.DATA}
        expected = data[5:] + (b"!" if way == "trailing" else b"")
        assert b"".join(piece for _, piece in pieces) == expected


def test_every_message_has_a_vector():
    assert {vector["type"] for vector in CONTROL} == set(TYPES)


@pytest.mark.parametrize("vector", VECTORS["lenient"], ids=lambda vector: vector["name"])
def test_lenient(vector):
    table = getattr(native, vector["table"])
    like = native.decode(frames([bytes.fromhex(MESSAGES[vector["like"]]["hex"])])[0], table)
    assert native.decode(frames([bytes.fromhex(vector["hex"])])[0], table) == like


def understand(chunks: list[bytes], table: native.Table) -> None:
    for frame in frames(chunks):
        native.decode(frame, table)


@pytest.mark.parametrize("vector", VECTORS["invalid"], ids=lambda vector: vector["name"])
def test_invalid(vector):
    for _, chunks in ways(bytes.fromhex(vector["hex"])):
        with pytest.raises(PeerError):
            understand(chunks, getattr(native, vector["table"]))


@pytest.mark.parametrize("vector", VECTORS["exchanges"], ids=lambda vector: vector["name"])
def test_exchange(vector):
    """Each side, fed with the other side's bytes of the vector, says the bytes of the vector."""
    constants = {name: bytes.fromhex(value) for name, value in VECTORS["constants"].items() if name != "secret"}
    secret, certificate = vector["secret"].encode(), bytes.fromhex(vector["certificate_sha256"])
    client = auth.ClientHandshake(
        m.Kind.SESSION,
        "server-a",
        secret,
        run_id=constants["run_id"],
        nonce=constants["client_nonce"],
        certificate=certificate,
    )
    assert client.start().hex() == vector["hello"]
    assert client.receive(bytes.fromhex(vector["challenge"])).hex() == vector["auth"]
    server = auth.ServerHandshake(
        lambda instance: [VECTORS["constants"]["secret"].encode(), secret],
        lambda key_id: None,
        nonce=constants["server_nonce"],
        certificate=certificate,
    )
    assert server.receive(bytes.fromhex(vector["hello"])).hex() == vector["challenge"]
    assert server.receive(bytes.fromhex(vector["auth"])) == b""
    welcome = server.welcome(0x0543B19C)
    assert vector["server_proof"] in welcome.hex()
    client.receive(welcome)
    assert client.welcome is not None


def test_certificate_hash():
    constants = VECTORS["constants"]
    der = bytes.fromhex(constants["certificate_der"])
    assert auth.certificate_hash(der).hex() == constants["certificate_sha256"]


def test_channel_auth():
    constants = {name: bytes.fromhex(value) for name, value in VECTORS["constants"].items() if name != "secret"}
    frame = auth.channel_auth(constants["key"], constants["certificate_sha256"], 1, constants["key_id"], 1)
    assert frame.hex() == MESSAGES["channel-auth"]["hex"]


@pytest.mark.parametrize("vector", VECTORS["counters"], ids=lambda vector: vector["name"])
def test_counters(vector):
    window = auth.ReplayWindow()
    assert [[counter, window.accept(counter)] for counter, _ in vector["steps"]] == vector["steps"]


def document_blocks() -> dict[str, str]:
    text = (ROOT / "docs/protocol.md").read_text()
    blocks = {}
    for name, body in re.findall(r"^```hex ([a-z0-9-]+)\n(.*?)^```$", text, re.M | re.S):
        assert name not in blocks, f"{name} twice"
        blocks[name] = "".join(re.sub(r"#.*", "", body).split())
    return blocks


def test_document_has_every_vector_and_no_other():
    assert document_blocks() == {name: vector["hex"] for name, vector in MESSAGES.items()}


def test_document_describes_every_member_of_the_vectors():
    text = (ROOT / "docs/protocol.md").read_text().partition("## 12.")[2]
    assert re.findall(r"^\| `(\w+)` \|", text, re.M) == list(VECTORS)


def test_document_has_every_transcript_figure():
    text = (ROOT / "docs/protocol.md").read_text()
    for name, value in VECTORS["constants"].items():
        assert value in text, name
    for exchange in VECTORS["exchanges"]:
        assert exchange["client_proof"] in text, exchange["name"]
        assert exchange["server_proof"] in text, exchange["name"]


def test_document_lists_every_message_with_its_number():
    text = (ROOT / "docs/protocol.md").read_text()
    for name, kind in {**TYPES, "DATA": None}.items():
        number = kind.TYPE if kind else native.DATA
        assert f"| 0x{number:02x} | {name} |" in text


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*(subclasses(each) for each in kind.__subclasses__()))


def test_document_explains_every_code_and_says_whether_to_retry():
    text = (ROOT / "docs/protocol.md").read_text().partition("## 9. Codes")[2].partition("## 10.")[0]
    rows = re.findall(r"^\| `(\w+)` \|.*\| (yes|no) \|$", text, re.M)
    never_sent = {
        "error",  # the base
        "bad_configuration",
        "bad_usage",
        "client_not_allowed",  # closed without an answer
        "command_not_supported",  # SOCKS
        "address_type_not_supported",  # SOCKS
        "refused_by_proxy",  # the client's
        "via_unavailable",  # an agent's, to its own clients
    }
    codes = {
        kind.code: "yes" if kind.retry else "no"
        for kind in subclasses(errors.ProxyError)
        if kind.__module__ in ("proxy.errors", "proxy.protocols.native.auth")
    }
    assert dict(rows) == {code: retry for code, retry in codes.items() if code not in never_sent}


def test_document_names_every_field_in_order():
    text = (ROOT / "docs/protocol.md").read_text()
    for name, kind in TYPES.items():
        section = re.search(rf"^#+ {name}\b.*?(?=^#+ |\Z)", text, re.M | re.S)
        assert section, name
        documented = re.findall(r"^\| \d+ \| `(\w+)` \|", section[0], re.M)
        assert documented[: len(kind.__struct_fields__)] == list(kind.__struct_fields__), name
