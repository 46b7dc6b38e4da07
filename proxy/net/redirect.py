"""Where a connection was meant for before the kernel redirected it (nftables `redirect`, iptables REDIRECT)."""

from __future__ import annotations

from _socket import AF_INET6, IPPROTO_IPV6, SOL_IP

from proxy.model import Endpoint, ip_from_bytes
from proxy.net.relay import RawSocket

#: linux/netfilter_ipv4.h SO_ORIGINAL_DST and linux/netfilter_ipv6/ip6_tables.h IP6T_SO_ORIGINAL_DST.
_ORIGINAL_DST = 80
_SOCKADDR_IN, _SOCKADDR_IN6 = 16, 28


def meant_for(sock: RawSocket) -> Endpoint | None:
    """The address and port that the client dialled; None where nothing was redirected."""
    try:
        if sock.family == AF_INET6:
            address = sock.getsockopt(IPPROTO_IPV6, _ORIGINAL_DST, _SOCKADDR_IN6)
            dialled = Endpoint(ip_from_bytes(address[8:24]), int.from_bytes(address[2:4], "big"))
        else:
            address = sock.getsockopt(SOL_IP, _ORIGINAL_DST, _SOCKADDR_IN)
            dialled = Endpoint(ip_from_bytes(address[4:8]), int.from_bytes(address[2:4], "big"))
    except OSError:  # ENOENT: the kernel tracks no such connection; ENOPROTOOPT: it tracks none at all
        return None
    here = sock.getsockname()
    return None if dialled == Endpoint(here[0], here[1]) else dialled
