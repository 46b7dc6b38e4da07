"""TLS sessions that go on in the next connection, with a real receiver: OpenSSL's, of either version."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from time import monotonic

import pytest

from proxy.egress.bring_up import open_receiver
from proxy.egress.receiver import Limits, Receiver, Wish
from proxy.egress.resumption import Sessions
from proxy.errors import UpstreamError
from proxy.model import Endpoint, TlsMode
from proxy.net import certificates
from proxy.net.certificates import Authorities, Judge
from proxy.net.relay import make_engine
from proxy.policy.certificates import Demand, Tlsa
from tests.certificates import NAME, authority
from tests.mx import Mx, Session, close
from tests.waiting import wait_for

V12, V13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
VERIFIED = Demand((NAME,), authority=True)


@pytest.fixture(autouse=True)
def trust() -> Iterator[None]:
    before = list(certificates._judges)
    certificates.use_judge(Judge(Authorities(authority().cert_pem.bytes())))
    yield
    certificates._judges[:] = before


class House:
    def __init__(self, mx: Mx) -> None:
        self.mx, self.engine, self.sessions = mx, make_engine(), Sessions()

    def open(self, mode: TlsMode = TlsMode.REQUIRED, demand: Demand = VERIFIED, name: str = NAME) -> Receiver:
        """A connection that is closed again; what TLS came to is left."""
        limits = Limits(10.0, 10.0, monotonic() + 20.0)
        receiver = open_receiver(
            self.engine,
            Wish("mta.example.org", mode, name, demand),
            "127.0.0.5",
            Endpoint(*self.mx.endpoint),
            limits,
            900.0,
            lambda stream: self.engine.close(stream.socket),
            sessions=self.sessions,
        )
        self.engine.close(receiver.stream.socket)
        return receiver

    def resumed(self, **words: object) -> bool:
        """Whether the next connection goes on in a session; both sides say the same."""
        facts = self.open(**words).tls  # type: ignore[arg-type]
        assert facts is not None
        assert facts.resumed is self.mx.sessions[-1].resumed
        return facts.resumed


Make = Callable[[Mx], House]


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as stack:

        def make(mx: Mx) -> House:
            house = House(mx)
            stack.callback(house.engine.stop)
            return house

        yield make


def last(mx: Mx) -> Session:
    """The receiver's last session, when it is over: we may be gone before it knows how the handshake ended."""
    session = mx.sessions[-1]
    wait_for(lambda: session.ended, what="it is over")
    return session


def only(version: ssl.TLSVersion) -> Callable[[ssl.SSLContext], None]:
    def prepare(context: ssl.SSLContext) -> None:
        context.maximum_version = version

    return prepare


@pytest.mark.parametrize("version", [V12, V13])
@pytest.mark.parametrize("mode", [TlsMode.OPPORTUNISTIC, TlsMode.REQUIRED, TlsMode.IMPLICIT])
def test_the_second_handshake_goes_on_in_the_first(make: Make, mode: TlsMode, version: ssl.TLSVersion) -> None:
    implicit = mode is TlsMode.IMPLICIT
    with Mx(starttls=not implicit, implicit_tls=implicit, prepare=only(version)) as mx:
        house = make(mx)
        first, second, third = house.open(mode).tls, house.open(mode).tls, house.open(mode).tls
        assert first is not None
        assert [facts and facts.resumed for facts in (first, second, third)] == [False, True, True]
        assert [session.resumed for session in mx.sessions] == [False, True, True]
        assert second == first._replace(resumed=True), "the certificates are told, and what they prove"
        assert first.verdict.verified


def test_never_for_who_demands_something_else(make: Make) -> None:
    leaf = b"x" * 32
    with Mx(starttls=True) as mx:
        house = make(mx)
        wanted = TlsMode.OPPORTUNISTIC
        assert not house.resumed(mode=wanted, demand=Demand((NAME,)))
        assert house.resumed(mode=wanted, demand=Demand((NAME,)))
        assert not house.resumed(demand=VERIFIED)
        assert not house.resumed(demand=Demand((NAME, "other.example.net"), authority=True))
        assert not house.resumed(mode=wanted, demand=Demand((NAME,)), name="other.example.net")
        with pytest.raises(UpstreamError, match="no TLSA record fits"):
            house.open(demand=Demand((NAME,), tlsa=(Tlsa(3, 1, 1, leaf),)))
        assert not last(mx).resumed
        assert house.resumed(demand=VERIFIED)


def test_what_is_not_trusted_any_more_is_found_in_a_resumed_session_too(make: Make) -> None:
    with Mx(starttls=True) as mx:
        house = make(mx)
        house.open()
        certificates.use_judge(Judge(Authorities(b"")))
        with pytest.raises(UpstreamError, match="certificate not accepted"):
            house.open()
        assert last(mx).resumed
        assert len(house.sessions) == 0
        with pytest.raises(UpstreamError, match="certificate not accepted"):
            house.open()
        assert not last(mx).resumed


def test_a_receiver_that_has_forgotten_it_gets_a_full_handshake(make: Make) -> None:
    with Mx(starttls=True) as mx:
        house = make(mx)
        house.open()
        mx._contexts.clear()  # other keys for tickets
        assert not house.resumed()
        assert house.resumed()


def test_a_handshake_that_breaks_takes_the_session_with_it(make: Make) -> None:
    with Mx(lambda number: {"tls": close} if number in (1, 2) else {}, starttls=True) as mx:
        house = make(mx)
        house.open()
        with pytest.raises(UpstreamError):
            house.open()
        assert mx.connects == 3, "a full handshake was tried"
        assert len(house.sessions) == 0
        assert not house.resumed()


@pytest.mark.parametrize("mode", [TlsMode.REQUIRED, TlsMode.IMPLICIT])
def test_who_must_have_tls_has_a_full_handshake_too(make: Make, mode: TlsMode) -> None:
    """A receiver that breaks each resumed handshake would get every second connection's mail late."""
    implicit = mode is TlsMode.IMPLICIT
    with Mx(lambda number: {"tls": close} if number == 1 else {}, starttls=not implicit, implicit_tls=implicit) as mx:
        house = make(mx)
        house.open(mode)
        facts = house.open(mode).tls
        assert (facts and (facts.resumed, facts.verdict.verified), mx.connects) == ((False, True), 3)


def test_who_would_do_without_tls_has_a_full_handshake_before_that(make: Make) -> None:
    """An attacker who breaks resumed handshakes alone gets nobody to speak in clear."""
    with Mx(lambda number: {"tls": close} if number == 1 else {}, starttls=True) as mx:
        house = make(mx)
        wanted = Demand((NAME,))
        house.open(TlsMode.OPPORTUNISTIC, wanted)
        receiver = house.open(TlsMode.OPPORTUNISTIC, wanted)
        assert (receiver.tls is not None, receiver.in_clear, mx.connects) == (True, None, 3)
        assert not mx.sessions[-1].resumed


def test_a_receiver_that_hands_out_none(make: Make) -> None:
    def without(context: ssl.SSLContext) -> None:
        context.num_tickets = 0
        context.options |= ssl.OP_NO_TICKET

    with Mx(starttls=True, prepare=without) as mx:
        house = make(mx)
        house.open()
        assert len(house.sessions) == 0
        assert not house.resumed()


def test_without_a_place_for_them_each_handshake_is_a_full_one(make: Make) -> None:
    with Mx(starttls=True) as mx:
        house = make(mx)
        house.sessions = None  # type: ignore[assignment]
        house.open()
        house.open()
        assert [session.resumed for session in mx.sessions] == [False, False]
