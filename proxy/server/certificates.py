"""Certificates as the settings name them, read at a start and at each reload: ours, and those we trust.

A mistake in a file is a `ConfigError` with the place of the directive that names it. What a certificate has to be is
for `net`; which one a receiver is shown is looked up in `shown`.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from contextlib import AbstractContextManager

import gevent

from proxy.config.load import Loaded
from proxy.model import Breathe
from proxy.net import certificates, identities
from proxy.policy.modes import any_smtp
from proxy.server.shown import Shown, pairs
from proxy.settings import Settings


class Certificates:
    """Reads them for the server.

    Args:
        lent: gives descriptors for the files, which are held back for that.
    """

    def __init__(self, lent: Callable[[], AbstractContextManager[None]]) -> None:
        self._lent = lent
        self._generated: identities.ServerIdentity | None = None

    def generated(self) -> bytes:
        """Certificate and key that were made in memory; b"": none were."""
        return self._generated.pem if self._generated is not None else b""

    def use_generated(self, pem: bytes) -> None:
        """Show those of another process of this program; b"": it has none."""
        if pem and pem != self.generated():
            self._generated = identities.identity_of(pem)

    def of_doors(self, loaded: Loaded) -> tuple[identities.ServerIdentity | None, ssl.SSLContext | None]:
        """What clients are shown, and what the standard doors with TLS speak; None: nobody needs it.

        Raises:
            ConfigError: the operator's files are of no use.
        """
        settings = loaded.settings
        try:
            with self._lent():
                identity = self._identity(settings)
                if identity is None or not settings.secure_doors:
                    return identity, None
                return identity, identities.door_context(identity, settings.tls_client_ca_file)
        except identities.UnfitIdentity as error:
            where = loaded.origins.place(error.directive)
            raise where.mistake(f"{error.directive}: {error}") from None

    def _identity(self, settings: Settings) -> identities.ServerIdentity | None:
        """What the native listener and mode smtp's STARTTLS show; one made in memory stays the same over reloads.

        Raises:
            UnfitIdentity: the operator's files are of no use.
        """
        native = settings.listen and settings.listen_tls
        if not (native or settings.mode_smtp_starttls or settings.secure_doors):
            return None
        certificate, key = settings.tls_certificate_file, settings.tls_private_key_file
        if certificate is None or key is None:
            self._generated = self._generated or identities.generated_identity(socket.gethostname())
            return self._generated
        return identities.load_identity(certificate, key)

    def for_receivers(self, loaded: Loaded, breathe: Breathe) -> Shown:
        """What receivers are shown.

        Raises:
            ConfigError: the operator's files are of no use.
        """
        shown = Shown()
        for pair in pairs(loaded.settings, breathe):
            try:
                with self._lent():
                    shown.add(pair, pair.load())
            except identities.UnfitIdentity as error:
                directive = error.directive if pair.value is None else pair.directive
                where = loaded.origins.place(directive, pair.value)
                raise where.mistake(f"{directive}: {pair.sentence(error)}") from None
            breathe()
        return shown

    def of_store(self, loaded: Loaded) -> identities.StoreTls | None:
        """What is spoken with the throttle store; None: it is in clear, or there is none.

        Raises:
            ConfigError: the operator's files are of no use.
        """
        try:
            with self._lent():
                return store_tls(loaded.settings)
        except identities.UnfitIdentity as error:
            where = loaded.origins.place(error.directive)
            raise where.mistake(f"{error.directive}: {error}") from None

    def judge(self, settings: Settings) -> certificates.Judge | None:
        """With the authorities as they are now: read by each reload, and not under the first connection."""
        if not (settings.listen or any_smtp(settings)):
            return None
        with self._lent():  # and others do not run meanwhile, who would take what is lent
            pem = certificates.read_authorities()
        return certificates.Judge(gevent.get_hub().threadpool.apply(certificates.Authorities, (pem,)))


def store_tls(settings: Settings) -> identities.StoreTls | None:
    """TLS with the throttle store; None: it is in clear, or there is none.

    Raises:
        UnfitIdentity: the operator's files are of no use.
    """
    if settings.throttle_store is None or not settings.throttle_store.tls:
        return None
    return identities.store_tls(
        settings.throttle_store_tls_ca_file,
        settings.throttle_store_tls_certificate_file,
        settings.throttle_store_tls_private_key_file,
    )
