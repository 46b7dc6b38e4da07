"""Towards receivers: a socket from the right address, an SMTP session on it, kept when idle, within the limits.

Which door a client came through, and what it speaks, is not known here; whoever has a request in the program's
vocabulary is served the same.

Read `upstream` (a socket), `bring_up` (greeting, EHLO, TLS on it: a `receiver`), `pool` (pure: which idle connection
fits) and `keeper` (its doing side), then `admission` (the throttles' clock, and what follows from each call) with
`waiters` (who waits for a place or a slot). `office` says what of these a connection needs, and `asking` waits for it;
in a worker process `remote` has it of the master's `branch`, and `lent` are the places held so. `look_ups` asks DNS
what the domains of blocks mean, `tlsa` for TLSA records, and `demands` joins what a client and the operator's `tls`
blocks want of TLS.
"""
