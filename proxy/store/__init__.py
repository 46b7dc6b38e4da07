"""The engine that limits of several proxies are kept in (Valkey or Redis): a client that never makes the program wait.

`store` is what others use: scripts go out in one pipelined connection, and each call comes back with what became of it
(`calls`): answered, refused, lost, or never sent. What is asked there and what an answer means for a limit is not known
here.

Read `calls` and `store`; then `link` (one connection: TLS, login, replies in their order), `finding` (which server:
by Sentinel, of a cluster) and `probe` (what `--check-config` asks). Pure are `calls`, `wire` (the bytes), `slots` (of a
cluster), `servers` (what INFO and error replies say) and `remedies` (what to do about it).
"""
