"""Sockets, TLS and greenlets, of whatever protocol: nothing here knows of mail, sources or limits.

`relay` is the engine: one edge-triggered epoll for all sockets, which joins two of them into a pair (`_fastrelay` is
the same with its inner loop in C; `_fastframes`: what it does for a channel between two messages). `sockets` makes what
a session's set-up begins with (`_fastsockets` is the same in C), `conversation` waits
for bytes, `tls` is TLS in the same shape (`contexts`: of which kind, `identities`: what is shown), `alarm` the coarse
deadlines, `probing` finds out whether who is not read still lives, `crew` the pooled greenlets, `seam` the link between
two processes of the program.

Read `relay`; the rules that keep it right stand at its top.
"""
