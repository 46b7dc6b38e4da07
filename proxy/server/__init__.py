"""The process: signals, reload, drain, wiring, listening sockets, systemd.

Everything is put together here and nothing else is done here: what happens with an accepted connection is `doors`',
what a directive means is `config`'s.

Read `server` first, `listener` (one listening socket) and `listeners` (all of them), `process` (descriptors, garbage
collection, the hub), `systemd`, `routine` (now and then), `drain` (the end); `check_config` asks the machine what a
start would and has `advice`, both as `findings`; `ping` looks at a running proxy. Of several processes: `workers`
(their lives), `staff` (one of them), `child` (a process), `roll_call` (what they are asked), `worker` (the other side);
of an upgrade: `upgrade`, `succession` and `replacement`.
"""
