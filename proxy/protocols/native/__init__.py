"""The native protocol between an MTA and the proxy: frames, typed messages, proofs (docs/protocol.md is normative).

Sans-IO like its parent; the MTA's library and the program read and write the same frames with the same code, so what
stands here must not need gevent. Who is let in and what is answered is decided elsewhere.

Read `frames` (cut and joined), `messages` and `session_messages` (their fields), then `auth` (the handshake).
"""
