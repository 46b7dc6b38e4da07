"""Who may do what: decisions about addresses, secrets, sources and destinations.

Pure: an address and settings go in, a verdict or a `ProxyError` comes out. What a verdict means for a socket is the
doors' work, and limits that instances share are `throttling`.

Read `access` (who may connect, leave from where, go where), then `budget` (how often an address may fail).
"""
