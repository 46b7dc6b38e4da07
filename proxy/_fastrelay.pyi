"""For mypy: the compiled engine has the interface of the one in Python (it is no subclass of it)."""

from proxy import relay

class Engine(relay.Engine): ...
