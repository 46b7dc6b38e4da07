"""Towards receivers: a socket from the right address, an SMTP session on it, kept when idle, within the limits.

Which door a client came through, and what it speaks, is not known here; whoever has a request in the program's
vocabulary is served the same.

Read `upstream` (a socket), `bring_up` (greeting, EHLO, TLS on it: a `receiver`), `pool` (pure: which idle connection
fits) and `keeper` (its doing side), then `admission` (who waits for a place or a slot, and the throttles' clock).
`office` says what of these a connection needs; in a worker process `remote` has it of the master's `branch`.
`look_ups` asks DNS what the domains of blocks mean, `tlsa` for TLSA records, and `demands` joins what a client and the
operator's `tls` blocks want of TLS.
"""
