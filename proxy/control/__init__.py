"""The control socket: looking at a running proxy and steering it, from its own machine.

`commands` (pure) is the vocabulary: which words make a command, who may say it, what an answer looks like. `door`
listens on the Unix socket and asks the kernel who is there; `client` is `greenarrow_proxy ctl`. What is shown are the
rows of the one view (`status.view`), and what is done is done by `server`: nothing is looked at or decided a second
time.

Read `commands`, `door`, `client`.
"""
