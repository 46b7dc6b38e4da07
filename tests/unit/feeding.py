"""Feed a handshake its bytes in every way a network may deliver them, and settings for tests that need some.

Each vector goes through whole, byte by byte and with bytes behind it, and must come out the same each time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_network
from itertools import pairwise

from proxy.errors import PeerError
from proxy.model import Accepted, Connect, Event, Handshake, Reply
from proxy.settings import InstanceSettings, Settings

#: What a client could send behind its handshake; not a beginning of anything that the doors understand.
PAYLOAD = b"EHLO client.example\r\n\x00\xff"

Answer = Callable[[Event], Reply]


class Outcome:
    """What came out of a handshake: the events, the bytes said, the payload left, the error that ended it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.sent: list[bytes] = []
        self.error: PeerError | None = None
        self.trailing = b""

    @property
    def key(self) -> tuple[object, ...]:
        """For comparing two outcomes; the error by class and words."""
        return ([(type(e), e) for e in self.events], self.sent, type(self.error), str(self.error), self.trailing)


def accept(_: Event) -> Reply:
    return Accepted()


def run(
    handshake: Handshake, chunks: Iterable[bytes], answer: Answer = accept, another: Handshake | None = None
) -> Outcome:
    """Deliver the chunks as `front` would, answering each event; stops reading at the end of the handshake.

    Args:
        another: has the last word in place of `handshake`, as in another worker.
    """
    outcome = Outcome()
    rest = list(chunks)
    over = False
    while True:
        while not over:
            try:
                event = handshake.next_event()
            except PeerError as error:
                outcome.error = error
                outcome.sent.append(handshake.send(error))
                over = True
                break
            if event is None:
                break
            reply = answer(event)
            outcome.events.append(event)
            if another is not None and isinstance(event, Connect):
                another.go_on(handshake.requested(), event)
                handshake = another
            outcome.sent.append(handshake.send(reply))
            over = isinstance(event, Connect) or not isinstance(reply, Accepted)
        if over or not rest:
            break
        handshake.receive(rest.pop(0))
    if over:
        assert handshake.next_event() is None
    if over and outcome.error is None and outcome.events and isinstance(outcome.events[-1], Connect):
        outcome.trailing = handshake.trailing + b"".join(rest)
    return outcome


def split(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    """`data` cut at the given places (taken modulo its length)."""
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(places)]


def feed(make: Callable[[], Handshake], data: bytes, answer: Answer = accept) -> Outcome:
    """The outcome of `data`, after checking that whole, byte by byte and trailed deliveries agree on it."""
    whole = run(make(), [data], answer)
    single = run(make(), [bytes((byte,)) for byte in data], answer)
    assert single.key == whole.key
    trailed = run(make(), [data + PAYLOAD], answer)
    if whole.error is None and whole.events and isinstance(whole.events[-1], Connect):
        assert trailed.trailing == whole.trailing + PAYLOAD
        trailed.trailing = whole.trailing
    if whole.error is not None or (whole.events and isinstance(whole.events[-1], Connect)):
        assert trailed.key == whole.key
    assert run(make(), [data], answer, make()).key == whole.key
    return whole


def networks(*texts: str) -> tuple[object, ...]:
    return tuple(ip_network(text) for text in texts)


def instance(name: str, **changes: object) -> InstanceSettings:
    values: dict[str, object] = {"allow_from": (), "source_ip": (), "auth_shared_secret": (), "weight": 1.0}
    return InstanceSettings(name=name, **(values | changes))  # type: ignore[arg-type]


def settings(**changes: object) -> Settings:
    """The documented defaults with one client network and one secret, and what the test changes."""
    everyone = networks("127.0.0.0/24", "10.0.0.0/8")
    values: dict[str, object] = {
        "config_filename": None,
        "listen": (),
        "listen_socks5": (),
        "listen_proxy_protocol": (),
        "listen_redirect": (),
        "listen_socks5_tls": (),
        "listen_proxy_protocol_tls": (),
        "listen_status": None,
        "listen_status_name": (),
        "allow_from": everyone,
        "listen_proxy_protocol_allow_from": everyone,
        "listen_status_allow_from": networks("127.0.0.0/8", "::1"),
        "auth_shared_secret": (b"0" * 32,),
        "auth_shared_secret_file": (),
        "socks5_auth": "required",
        "listen_tls": True,
        "tls_certificate_file": None,
        "tls_private_key_file": None,
        "tls_client_ca_file": None,
        "tls_client_certificate_file": None,
        "tls_client_private_key_file": None,
        "via": (),
        "via_secret": None,
        "via_instance": None,
        "via_tls": True,
        "source_ip": (),
        "default_source_ip": (),
        "destination_port": ((25, 25), (465, 465), (587, 587)),
        "deny_destination": networks(
            "127.0.0.0/8",
            "0.0.0.0/8",
            "169.254.0.0/16",
            "10.0.0.0/8",
            "172.16.0.0/12",
            "192.168.0.0/16",
            "100.64.0.0/10",
            "224.0.0.0/4",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::/10",
            "fc00::/7",
            "ff00::/8",
        ),
        "allow_destination": (),
        "connect_timeout": 30.0,
        "auth_timeout": 10.0,
        "idle_timeout": 900.0,
        "half_close_timeout": 60.0,
        "drain_timeout": 60.0,
        "upgrade_timeout": 900.0,
        "max_connections": None,
        "reuse_connections": True,
        "reuse_connections_max_idle": 30.0,
        "reuse_connections_max_age": 300.0,
        "reuse_connections_max_messages": 100,
        "reuse_connections_max_errors": 5,
        "reuse_connections_max_cached": 1000,
        "reuse_connections_max_cached_per_destination": 10,
        "control_socket": None,
        "control_socket_mode": "0660",
        "control_group": None,
        "mode": "tcp",
        "mode_smtp_starttls": False,
        "mode_smtp_auth": False,
        "smtp_tls": "opportunistic",
        "throttle_enforce": False,
        "throttle_close_timeout": 1.0,
        "dns_server": None,
        "dns_trust_ad": False,
        "timezone": "UTC",
        "throttle_store": None,
        "throttle_store_members": None,
        "throttle_store_password_file": None,
        "throttle_store_sentinel_password_file": None,
        "throttle_store_tls_ca_file": None,
        "throttle_store_tls_certificate_file": None,
        "throttle_store_tls_private_key_file": None,
        "workers": 1,
        "log_verbose": False,
        "log_format": "text",
        "log_connections": "all",
        "log_messages": False,
        "stats_interval": 10.0,
        "instance": (),
        "listener": (),
        "source": (),
        "throttle": (),
        "tls": (),
    }
    return Settings(**(values | changes))  # type: ignore[arg-type]


def alive(kind: type) -> int:
    """How many objects of a class there are. (Those of compiled classes have no weak references.)"""
    return sum(type(each) is kind for each in gc.get_objects())
