"""What clients come in through: from an accepted socket to its last log line.

`front` serves the standard doors, SOCKS5 and PROXY protocol: the data path. `native/` serves programs that speak our
own protocol. Doors know protocols, policy and egress, never each other; listening sockets are `server`'s.

Read `front`: the whole way of one connection, from top to bottom. Its steps are in `request` (what the client asks for)
and `route` (from where, to where), on its `record`.
"""
