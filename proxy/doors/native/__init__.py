"""The native door: who is it (`entrance`), its SMTP sessions (`channel`), its throttle session (`control`).

A channel is a client's connection that carries one SMTP session after another: `link` is the client's end, `open` finds
a receiver for an OPEN, `transfer` moves the bytes, `session` answers END and counts. A throttle session speaks for the
throttles of one instance: `control_frames` are its answers, `control_queue` what waits to be sent. What the frames look
like is `protocols.native`.

Read `entrance`, `channel`, then `control`.
"""
