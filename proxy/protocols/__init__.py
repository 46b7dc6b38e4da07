"""Bytes of a peer to events and back, for every protocol that is spoken here.

Sans-IO: a parser is fed bytes, however they are cut, and returns events or bytes to send; it raises `PeerError` for
what a peer may not say, and nothing else. Sockets, deadlines and rules about who may what do not belong here.

Read `socks5` and `proxy_protocol` first: both yield one `model.Handshake`. `native/` is our own protocol, `smtp/` what
passes through, `seam` what the program's own processes say to each other.
"""
