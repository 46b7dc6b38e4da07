"""What the program says: a closed vocabulary of events, and lines that never make the program wait.

`events` is the vocabulary; `lines` has what the rest of the program calls, `formats` and `spelling` the shapes, text or
JSON, of docs/operations.md: peers' words are escaped and cut there. `outputs` is the set-up, and `writer` brings lines
to stdout and stderr whoever reads them, or nobody. What is worth a line is decided by those who call.

Read `events`, `lines`, `outputs`, then `writer`.
"""
