"""Mode smtp: the proxy takes part in the SMTP dialogue that passes through a SOCKS5 or PROXY door.

`front` has done the handshake and hands over; from then on `visit` serves the connection in its greenlet. What is said,
to whom and in which order is decided by the pure `protocols.smtp.mediator`, which asks for one thing at a time: a
connection to the receiver, a message's slot, the end. `egress` is where these come from, behind one interface: our own
sockets and the keeper here, another proxy in the agent.
"""
