"""Limits that hold for all instances together: slots for messages, places for connections.

Pure: time is an argument, what to send is a return value, and no lock is needed (docs/architecture.md). The promises
and their proof are docs/throttling.md. Frames, sockets and timers are elsewhere: `egress.admission` is this room's
clock, `doors.native.control` speaks for it.

Read `throttle` (when the next slots are), `limits` (what several instances demand), `flows`, `dispenser` (who gets a
slot; below it `queues`, `returns`, `giving`) and `places` (who gets a connection), then `manager`, which holds them
together: `core`, `attendance`, `statements`, `requests` and `handover` are parts of it. `lease` is the MTA's side.
"""
