"""What a process that serves connections is made of: parts that live as long as it does, and services of its settings.

The server has one, and so has each worker. What may fail, or takes a while, is `prepare`; `take` puts it in force, and
cannot fail. Listening sockets, signals, status and control are not here.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from time import monotonic
from typing import NamedTuple

from proxy.config.load import Loaded
from proxy.egress import via
from proxy.egress.acquaintances import Acquaintances
from proxy.egress.admission import Admission
from proxy.egress.broken_tls import BrokenTls
from proxy.egress.demands import Demands
from proxy.egress.keeper import Keeper
from proxy.egress.look_ups import LookUps
from proxy.egress.office import Office
from proxy.egress.resumption import Sessions
from proxy.egress.tlsa import TlsaLookUps
from proxy.log import lines as log
from proxy.log import outputs
from proxy.model import Breathe, Endpoint
from proxy.net import certificates
from proxy.net.addresses import own_addresses
from proxy.net.crew import Crew
from proxy.net.newcomers import Newcomers
from proxy.net.relay import make_engine
from proxy.policy.access import Access
from proxy.policy.budget import FailureBudget
from proxy.policy.directory import Book
from proxy.policy.limits import Limits
from proxy.policy.modes import Modes
from proxy.policy.tls_rules import TlsRules
from proxy.policy.trouble import Troubles
from proxy.server import check_config
from proxy.server.certificates import Certificates
from proxy.services import Gauges, Instances, Neighbours, Services
from proxy.settings import Settings
from proxy.stats import Counters

#: Connections that have not said who they are, and those that wait for the answer to a wrong secret.
_MAX_NEWCOMERS = 1024
_MAX_SLOWED = 256


class Prepared(NamedTuple):
    """What new settings need of these parts, had and not yet used."""

    services: Services
    judge: certificates.Judge | None
    limits: Limits


class Wiring:
    """The parts of one process.

    Args:
        settings: to begin with.
        lent: gives descriptors that are held back, for files.
        office: made of this, before the keeper is.
    """

    def __init__(
        self,
        settings: Settings,
        lent: Callable[[], AbstractContextManager[None]],
        office: Callable[[Wiring], tuple[Office, Admission]],
    ) -> None:
        self.engine = make_engine()
        self.counters = Counters()
        self.troubles = Troubles()
        self.gauges = Gauges()
        self.crew = Crew()
        self.newcomers = Newcomers(_MAX_NEWCOMERS)
        self.slowed = Newcomers(_MAX_SLOWED)
        self.budget = FailureBudget()
        self.instances = Instances()
        self.incarnation: int = int.from_bytes(os.urandom(4), "big")
        self.book = Book()
        self.limits = Limits(settings.throttle, settings.source, self.book)
        self.certificates = Certificates(lent)
        self.office, self.admission = office(self)
        self.look_ups = LookUps(self.book, self.admission.manager.blocks.forget_verdicts)
        self.keeper = Keeper(self.engine, self.crew, self.counters, settings, self.office)
        self._broken_tls = BrokenTls()
        self._tlsa = TlsaLookUps()
        self._tls_sessions = Sessions()
        self._acquaintances = Acquaintances()
        self._via: via.Via | None = None
        self.neighbours: Neighbours | None = None
        self.services: Services

    # ---------------------------------------------------------------- settings

    def prepare(self, loaded: Loaded, own: Iterable[Endpoint], breathe: Breathe) -> Prepared:
        """Services of new settings.

        Args:
            own: where the program listens.

        Raises:
            ConfigError: a file that they name is of no use. Nothing has changed then.
        """
        settings = loaded.settings
        identity, door_context = self.certificates.of_doors(loaded)
        for finding in (*check_config.unfit_tls_blocks(settings), *check_config.unfit_timezone(settings)):
            where = loaded.origins.place(finding.directive, finding.value)
            raise where.mistake(f"{finding.directive}: {finding.message}")
        shown = self.certificates.for_receivers(loaded, breathe)
        judge = self.certificates.judge(settings)
        tls_rules = TlsRules(settings.tls, settings.source, self.book, breathe)
        services = Services(
            settings=settings,
            access=Access(settings, own_addresses(), own, breathe),
            modes=Modes(settings, breathe),
            engine=self.engine,
            counters=self.counters,
            troubles=self.troubles,
            gauges=self.gauges,
            crew=self.crew,
            newcomers=self.newcomers,
            slowed=self.slowed,
            budget=self.budget,
            instances=self.instances,
            keeper=self.keeper,
            broken_tls=self._broken_tls,
            demands=Demands(tls_rules, self._tlsa.get, self.look_ups.hear_of, shown.of),
            tls_sessions=self._tls_sessions,
            acquaintances=self._acquaintances,
            office=self.office,
            admission=self.admission,
            via=via.of_settings(self.engine, settings, socket.gethostname(), self._via),
            neighbours=self.neighbours,
            identity=identity if settings.listen and settings.listen_tls else None,
            mta_context=identity.mta_context if identity is not None and settings.mode_smtp_starttls else None,
            door_context=door_context,
            incarnation=self.incarnation,
            host_name=socket.gethostname(),
        )
        return Prepared(services, judge, Limits(settings.throttle, settings.source, self.book, breathe))

    def take(self, prepared: Prepared, breathe: Breathe) -> None:
        """Put new settings in force, but for what concerns sessions and throttles."""
        settings = prepared.services.settings
        self.services = prepared.services
        outputs.name_sources(self.services.access.name_of_source)
        if self._via is not None and self._via is not self.services.via:
            self._via.stop()
        self._via = self.services.via
        if prepared.judge is not None:
            certificates.use_judge(prepared.judge)
        if not settings.listen_redirect:
            self.gauges.ends = None
        elif self.gauges.ends is None:
            self.gauges.ends = set()
        self.keeper.apply(settings)
        self.engine.half_close_timeout = settings.half_close_timeout
        domains = [domain for block in settings.throttle for domain in block.domain]
        domains += [domain for tls_block in settings.tls for domain in tls_block.domain]
        self._tlsa.use(settings.dns_server)
        self.look_ups.use(domains, settings.dns_server, breathe)
        self.limits = prepared.limits

    def tell_dialogues(self) -> None:
        """Those in progress go on under new settings."""
        for dialogue in list(self.instances.dialogues):
            dialogue.reloaded(self.services)

    # ---------------------------------------------------------------- addresses of this machine

    def watch_addresses(self) -> None:
        """Act upon source addresses that go and come."""
        own_addresses().watch(self._source_gone, self._source_came)

    def _source_gone(self, host: str) -> None:
        """No answer can come to it any more, so nobody shall wait for one."""
        dropped = self.keeper.forsake(host)
        self.troubles.source_gone(host, monotonic())
        log.note(log.Event.ADDRESS, log.WARNING, "an address is gone from this machine", source=host, dropped=dropped)

    def _source_came(self, host: str) -> None:
        self.troubles.source_came(host)
        log.note(log.Event.ADDRESS, log.INFO, "an address is on this machine now", source=host)
