"""OPENED at its longest: whatever receivers said, it fits in one frame."""

from __future__ import annotations

import socket

from proxy.doors.native import session
from proxy.doors.native.open import Taken
from proxy.egress.pool import PoolKey
from proxy.egress.receiver import InClear, Receiver, TlsFacts
from proxy.errors import Step, UpstreamError
from proxy.model import Endpoint, TlsMode
from proxy.net.certificates import Verdict
from proxy.net.tls import PlainStream
from proxy.policy.certificates import Result
from proxy.protocols.native import frames
from proxy.protocols.native import messages as m

HERE = Endpoint("2001:db8:1111:2222:3333:4444:5555:6666", 65535)


def test_the_longest_opened_fits_in_a_frame() -> None:
    reply = "421 " + "\N{SNOWMAN}" * 2000
    with socket.socket() as never:
        receiver = Receiver(PlainStream(never), HERE.host, HERE, HERE, 0.0, 60.0)
    receiver.greeting = reply
    receiver.hello = tuple("x" * 60 for _ in range(300))
    verdict = Verdict(False, Result.HOST_MISMATCH, "v" * 512, "", "k" * 80, "s" * 512)
    receiver.tls = TlsFacts("TLSv1.3", "c" * 64, verdict, (bytes(20_000), bytes(12_768), bytes(1)))
    receiver.messages = 2**32 - 1
    error = UpstreamError("m" * 300, Step.STARTTLS, 65535, reply)
    taken = Taken(
        receiver,
        PoolKey(HERE.host, HERE, "x", TlsMode.NONE),
        True,
        InClear("starttls", reply, Result.STARTTLS_NOT_SUPPORTED),
    )
    frame = session.opened(taken, [(m.Address(*HERE), error)] * 32)
    decoder = frames.FrameDecoder()
    decoder.receive(frame)
    opened = frames.decode(decoder.next_frame(), frames.CHANNEL_FROM_PROXY)
    assert (len(opened.attempts), len(opened.ehlo)) == (32, 256)
    assert (len(opened.attempts[0].message), len(opened.attempts[0].smtp_reply)) == (100, 128)
    assert len(opened.tls_failure) == 512
