"""For mypy: the compiled engine has the interface of the one in Python (it is no subclass of it)."""

from proxy.net import relay

class Engine(relay.Engine): ...
