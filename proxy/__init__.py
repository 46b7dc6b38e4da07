"""GreenArrow Proxy: an SMTP egress proxy for several MTA instances (see docs/architecture.md)."""

__version__ = "0.1.0"
