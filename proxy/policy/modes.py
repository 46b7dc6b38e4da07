"""Whether the proxy takes part in a client's SMTP dialogue, and on which terms: `mode` and all that belongs to it.

The most particular word wins: the instance's block, then its listener's, then the global one. Pure; a reload makes a
new `Modes`, and a connection keeps what it began with.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from proxy.model import Breathe, Endpoint, TlsMode, hold_breath
from proxy.policy.sources import ehlo_names
from proxy.settings import Settings

#: Port of implicit TLS (RFC 8314): there is no dialogue to be seen.
_SUBMISSIONS: Final = 465
#: Terms that are remembered: the same few come again and again.
_MOST_REMEMBERED: Final = 4096


class Terms(NamedTuple):
    """On which terms one connection is served in mode smtp.

    Args:
        instance: the client's name, or "".
        source: the local address it leaves from. destination: the receiver.
        ehlo_name: what is said in EHLO there; None: whatever the client says, and the connection is not shared.
        tls: towards the receiver.
        group: who shares connections with whom; see `Modes.group`.
        offer_starttls, show_auth: what the client is offered of `mode_smtp_starttls` and `mode_smtp_auth`.
    """

    instance: str
    source: str
    destination: Endpoint
    ehlo_name: str | None
    tls: TlsMode
    group: str
    offer_starttls: bool
    show_auth: bool


class Modes:
    """The modes of one configuration.

    Attributes:
        any_smtp: whether mode smtp occurs at all; where not, nobody need ask further.
    """

    def __init__(self, settings: Settings, breathe: Breathe = hold_breath) -> None:
        self._settings = settings
        self._instances = {block.name: block for block in settings.instance}
        self._listeners = {block.name: block.mode for block in settings.listener}
        self._ehlo_names = ehlo_names(settings.source, breathe)
        self.any_smtp = any_smtp(settings)
        self._remembered: dict[tuple[str, str, str, Endpoint], Terms] = {}

    def is_smtp(self, instance: str, listener: Endpoint, destination: Endpoint) -> bool:
        """Whether the proxy takes part in the dialogue of this client.

        Args:
            listener: as it was configured.
        """
        if destination.port == _SUBMISSIONS:
            return False
        block = self._instances.get(instance)
        mode = block.mode if block else None
        if mode is None and self._listeners:
            mode = self._listeners.get(str(listener))
        return (mode or self._settings.mode) == "smtp"

    def terms(self, instance: str, client: str, source: str, destination: Endpoint) -> Terms:
        """What holds for a connection of this instance (or, without a name, of this client's address)."""
        key = instance, client, source, destination
        terms = self._remembered.get(key)
        if terms is None:
            if len(self._remembered) >= _MOST_REMEMBERED:
                self._remembered.clear()
            terms = self._remembered[key] = self._terms(instance, client, source, destination)
        return terms

    def _terms(self, instance: str, client: str, source: str, destination: Endpoint) -> Terms:
        block, settings = self._instances.get(instance), self._settings
        return Terms(
            instance=instance,
            source=source,
            destination=destination,
            ehlo_name=self._ehlo_names.get(source),
            tls=TlsMode((block.smtp_tls if block else None) or settings.smtp_tls),
            group=self.group(instance) or f"={instance or client}",
            offer_starttls=settings.mode_smtp_starttls,
            show_auth=settings.mode_smtp_auth,
        )

    def group(self, instance: str) -> str:
        """The instance's `share_with`, or "". A word never begins with "=" here: that is who shares with nobody."""
        block = self._instances.get(instance)
        return f":{block.share_with}" if block and block.share_with else ""


def any_smtp(settings: Settings) -> bool:
    """Whether mode smtp occurs at all."""
    said = [settings.mode, *[block.mode for block in settings.listener], *[block.mode for block in settings.instance]]
    return "smtp" in said
