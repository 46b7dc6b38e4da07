"""GreenArrow Proxy: an SMTP egress proxy for several MTA instances (see docs/architecture.md)."""

from proxy import form

__version__ = "0.1.0"

form.choose()  # before any other module is loaded
