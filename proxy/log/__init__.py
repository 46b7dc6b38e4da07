"""What the program says: a closed vocabulary of events, and lines that never make the program wait.

`lines` has the vocabulary and the shapes, text or JSON, of docs/operations.md; peers' words are escaped and cut there.
`writer` brings lines to stdout and stderr whoever reads them, or nobody. What is worth a line is decided by those who
call.

Read `lines`, then `writer`.
"""
