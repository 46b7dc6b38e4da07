"""From file, environment and command line to one frozen `Settings`, or to every mistake with its file and line.

Pure: texts go in. What the machine says of well-formed settings (is the address here, is the port free) is asked by
`server.check_config`, and putting them in force is `server`.

Read `options` (the table of all directives), `values` (each form of a value), `file` (the grammar), `rules` (what
must hold between directives), then `load`, which joins them.
"""
