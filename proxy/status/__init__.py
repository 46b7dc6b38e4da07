"""What operators see: one view of the program, as page, JSON, metrics and in the terminal.

Read-only; it changes nothing and decides nothing. `view` (pure) builds plain rows from the manager, the pool and the
counters in small steps, `rows` is their vocabulary and `spelled` how a figure is said; `page` and `metrics` render
them, `http` serves them under the names that `host` allows and keeps the last hour (`timeline`), `terminal` is
`--status`. The page's tables are `markup`'s, its style and script `looks`'.

Read `rows`, `view`, then `http`.
"""
