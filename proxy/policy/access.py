"""Who may connect, with which secret, leave from which address, and go where: the rules of one `Settings`.

Pure: a verdict depends on the settings and the arguments alone, so it is remembered (bounded, least recently used goes
first); only the machine's own addresses may change meanwhile, and they are asked for where they matter. Whatever is not
clearly allowed is refused. After a reload a new `Access` replaces the old one.

Addresses are canonical text (`model.canonical_ip`). What does not belong here: whether an address exists on this
machine (the bind tells), failure budgets and rate limits, and how a refusal is said.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from hashlib import sha256
from typing import Final, Literal

from proxy.errors import BadCredentials, ClientNotAllowed, DestinationNotAllowed, FamilyMismatch, SourceNotAllowed
from proxy.model import Breathe, Endpoint, canonical_ip, hold_breath
from proxy.policy.networks import Networks, forms, is_translated, parse
from proxy.policy.sources import Sources, address_or_unknown, split_user
from proxy.settings import InstanceSettings, Settings

Door = Literal["native", "socks5", "proxy_protocol", "redirect", "status"]

#: Verdicts remembered of each kind; one costs some 300 bytes.
_REMEMBERED: Final = 4096
#: Loopback must be listed as such: 127.0.0.0/8 or ::1 or a part of it, not a network that happens to contain it.
_LOOPBACK_PREFIX: Final = {4: 8, 6: 128}
_ANY_V4: Final = "0.0.0.0"
#: Seconds in which a client has its answer, where no block says more: a KumoMTA gives up 60 s after its request to a
#: proxy, SOCKS or PROXY protocol. Behind a redirection is an MTA that knows no proxy: it waits five minutes for the
#: greeting (RFC 5321 section 4.5.3.2.1).
SHORTEST_ANSWER: Final = 50.0
_ANSWER_WITHIN: Final = {"redirect": 240.0}
#: Who waits for a place leaves so many seconds for the connect, or half of what there is.
_FOR_THE_CONNECT: Final = 10.0
_ANY_V6: Final = "::"


def place_within(seconds: float) -> float:
    """How long to wait for a place, if there are so many seconds for the place and the connect together."""
    return max(seconds - _FOR_THE_CONNECT, seconds / 2)


class Access:
    """The rules in force.

    Args:
        settings: the configuration.
        own_addresses: contains this machine's addresses, as they are when it is asked: a listener on a wildcard
            address is reached through each of them.
        own_listeners: listeners beside those in `settings` that must not be connected to: the real ports behind a
            port 0, inherited sockets.
        breathe: called after each small piece of the work of preparing long lists.
    """

    def __init__(
        self,
        settings: Settings,
        own_addresses: Container[str],
        own_listeners: Iterable[Endpoint] = (),
        breathe: Breathe = hold_breath,
    ) -> None:
        self._settings = settings
        self._own_addresses = own_addresses
        self._own_ports = _hosts_by_port((*_listeners(settings), *own_listeners), breathe)
        self._digests = _digests(settings.auth_shared_secret)
        self._blocks = {block.name: block for block in settings.instance}
        #: Listeners with defaults of their own, by their configured address.
        self.listener_sources = {
            block.name: block.default_source_ip for block in settings.listener if block.default_source_ip
        }
        self._own_digests = {}
        for name, block in self._blocks.items():
            breathe()
            self._own_digests[name] = _digests(block.auth_shared_secret)
        self._source_names = Sources(settings.source, breathe)
        rules = _Rules(settings, self._blocks, breathe)
        self._instance = rules.instance
        self.client_allowed = lru_cache(_REMEMBERED)(rules.judge_client)
        self.instance_of_address = lru_cache(_REMEMBERED)(rules.find_instance)
        self._source_verdict = lru_cache(_REMEMBERED)(rules.judge_source)
        self._destination_verdict = lru_cache(_REMEMBERED)(rules.judge_destination)
        self._grant_route = lru_cache(_REMEMBERED)(
            partial(_judge_route, self._source_verdict, self._destination_verdict)
        )

    def secrets_of(self, instance: str) -> tuple[bytes, ...]:
        """The secrets that prove this name: the block's own ones; else, also for an unknown name, the global ones."""
        block = self._blocks.get(instance)
        return (block.auth_shared_secret if block else ()) or self._settings.auth_shared_secret

    def names_of(self, user: str) -> tuple[str, str | None]:
        """`instance+source` → both names, where there are source blocks and no instance has all of it as its name."""
        return (user, None) if user in self._blocks or not self._source_names else split_user(user)

    def source_named(self, name: str, destination: Endpoint) -> str:
        """The address that a source's name stands for; the caller has it checked like any other.

        Raises:
            SourceNotAllowed: there is no such name. FamilyMismatch: it has no address of the destination's family.
        """
        return self._source_names.address(name, destination)

    def authenticate(self, instance: str, shown: bytes, client: str | None = None) -> None:
        """Whether a secret proves this name. Takes the same time for every failure.

        Args:
            instance: as the client named itself, without the name of a source.
            shown: the SHA-256 digest of the secret that it showed.
            client: its address, held against the block's `allow_from`; None: do not look at it.

        Raises:
            BadCredentials: the same words whatever was wrong.
        """
        digests = self._own_digests.get(instance) or self._digests
        proven = not digests and self._settings.socks5_auth == "none"
        for digest in digests:
            proven |= hmac.compare_digest(shown, digest)
        if not proven or (client is not None and not self.instance_allowed(instance, client)):
            raise BadCredentials("unknown instance or wrong secret")

    def instance_of_certificate(self, names: Sequence[str], client: str) -> str:
        """Which instance a client is that has proven a certificate: the first of its names that a block has, else the
        first.

        Args:
            names: as `certificates.client_names` has them. client: its address.

        Raises:
            ClientNotAllowed: that instance does not come from there.
        """
        name = next((each for each in names if each in self._blocks), names[0])
        if not self.instance_allowed(name, client):
            raise ClientNotAllowed(f"{client} is not in allow_from of instance {name}")
        return name

    def weight_of(self, instance: str) -> float:
        """The instance's weight in the fair division of throttles: its block's, else 1."""
        block = self._blocks.get(instance)
        return block.weight if block else 1.0

    def answer_within(self, instance: str, protocol: str) -> float:
        """Seconds in which a request at a door must have its answer, waiting and connecting together."""
        block = self._blocks.get(instance)
        if block is not None and block.answer_within is not None:
            return block.answer_within
        return _ANSWER_WITHIN.get(protocol, SHORTEST_ANSWER)

    def instance_allowed(self, instance: str, client: str) -> bool:
        """Whether the instance may come from this address: its block's `allow_from`, if there is one."""
        block = self._instance(instance)
        return block is None or not block.clients or parse(client) in block.clients

    def check_source(self, instance: str, ip: str) -> None:
        """Whether the instance may leave from the address.

        Raises:
            SourceNotAllowed: not by `source_ip`, the global one or the instance's.
        """
        reason = self._source_verdict(instance, ip)
        if reason:
            raise SourceNotAllowed(reason)

    def name_of_source(self, ip: str) -> str:
        """The name that a `source` block gives this address, or ""."""
        return self._source_names.name_of(ip)

    def source_of_path(self, instance: str, name: str) -> str:
        """What a throttle counts by whose path has a source's name: its one address, or the name where it has several.

        Raises:
            SourceNotAllowed: no block has the name, or the instance may leave from none of its addresses.
        """
        self.check_source_of_path(instance, name)
        addresses = self._source_names.addresses(name)
        return name if len(addresses) > 1 else addresses[0]

    def check_source_of_path(self, instance: str, source: str) -> None:
        """Whether the instance may leave from an address, or from one of those that a name stands for.

        Raises:
            SourceNotAllowed: it may not, or there is no such name (any more).
        """
        reason = ""
        for ip in self._source_names.addresses(source) or (address_or_unknown(source),):
            reason = self._source_verdict(instance, ip)
            if not reason:
                return
        raise SourceNotAllowed(reason)

    def is_source_of_path(self, source: str, ip: str) -> bool:
        """Whether the address is that of a path, or one of those that its source's name stands for."""
        return source == ip or source == self._source_names.name_of(ip)

    def lists_source(self, instance: str, ip: str) -> bool:
        """Whether the address stands in `source_ip`, the global one or the instance's, and may be left from."""
        return self.has_source_lists(instance) and not self._source_verdict(instance, ip)

    def has_source_lists(self, instance: str) -> bool:
        """Whether there is any `source_ip` for this instance. An agent, which has no addresses to leave from, is to
        judge none without."""
        block = self._instance(instance)
        return bool(self._settings.source_ip or (block and block.sources))

    def default_source(
        self, instance: str, destination: Endpoint, dialled: str, listener: Endpoint | None = None
    ) -> str | None:
        """The address to leave from for a client that names none; the caller has it checked like any other.

        Args:
            instance: a block whose `source_ip` has one single address of the destination's family means that one.
            destination: decides the family.
            dialled: the address of ours that the client connected to, for `default_source_ip same`.
            listener: as it was configured; its block's addresses come before the global ones. None: a native one.

        Returns:
            None: the system's choice.
        """
        block = self._instance(instance)
        own = self.listener_sources.get(str(listener), ()) if listener is not None else ()
        candidates = [*(block.single_sources if block else ()), *own, *self._settings.default_source_ip]
        for candidate in candidates:
            source = canonical_ip(dialled) if candidate == "same" else candidate
            if (":" in source) == destination.is_ipv6:
                return source
        return None

    def check_destination(self, destination: Endpoint) -> None:
        """The destination alone, where no source is known yet: what is denied is not asked a route for.

        Raises:
            DestinationNotAllowed: as `check_route`.
        """
        if reason := self._destination_verdict(destination.host, destination.port):
            raise DestinationNotAllowed(reason)
        if destination.port in self._own_ports:
            self._refuse_own_listener(destination)

    def check_route(self, instance: str, source: str | None, destination: Endpoint) -> None:
        """Source, families and destination of one connection.

        Raises:
            SourceNotAllowed, FamilyMismatch, DestinationNotAllowed: in this order; the last for a port outside
                `destination_port`, a denied range (also as the IPv4 address inside an IPv6 one), this proxy itself.
        """
        self._grant_route(instance, source, destination)
        if destination.port in self._own_ports:
            self._refuse_own_listener(destination)

    def _refuse_own_listener(self, endpoint: Endpoint) -> None:
        """For a port of ours. Not remembered: the addresses of this machine may change."""
        if self._is_own_listener(endpoint):
            raise DestinationNotAllowed(f"{endpoint} is this proxy itself")

    def _is_own_listener(self, endpoint: Endpoint) -> bool:
        hosts = self._own_ports[endpoint.port]
        own = self._own_addresses
        for form in forms(parse(endpoint.host)):
            text = str(form)
            # Connecting to the unspecified address means this machine. A [::] that we inherited may serve IPv4, too.
            if text in hosts or form.is_unspecified:
                return True
            wildcard = _ANY_V6 in hosts or (form.version == 4 and _ANY_V4 in hosts)
            if wildcard and (form.is_loopback or text in own):
                return True
        return False


class _Rules:
    """The lists of the configuration, and what follows from them for an address.

    Apart from `Access`, which remembers the verdicts: what remembers must not hold itself, or the whole of an old
    configuration would stay in memory until the garbage collector finds it.
    """

    def __init__(self, settings: Settings, blocks: Mapping[str, InstanceSettings], breathe: Breathe) -> None:
        everyone = Networks(settings.allow_from, breathe=breathe)
        self._doors: dict[Door, Networks] = {
            "native": everyone,
            "socks5": everyone,
            "redirect": everyone,
            "proxy_protocol": Networks(settings.listen_proxy_protocol_allow_from, breathe=breathe),
            "status": Networks(settings.listen_status_allow_from, breathe=breathe),
        }
        self._sources = Networks(settings.source_ip, breathe=breathe)
        self._ports = settings.destination_port
        self._denied = Networks(settings.deny_destination, breathe=breathe)
        self._allowed = Networks(settings.allow_destination, breathe=breathe)
        translated = (net for net in settings.allow_destination if is_translated(net))
        self._allowed_translated = Networks(translated, breathe=breathe)
        clients = [(network, block.name) for block in settings.instance for network in block.allow_from]
        self._names = Networks([network for network, _ in clients], [name for _, name in clients], breathe)
        # Prepared when asked for: there may be thousands, and a reload would wait for them all.
        self.instance = lru_cache(_REMEMBERED)(partial(_prepare, blocks))

    def judge_client(self, ip: str, door: Door) -> bool:
        """Whether this address may connect at that door at all."""
        return parse(ip) in self._doors[door]

    def find_instance(self, ip: str) -> str:
        """The name of the block whose `allow_from` matches the address most closely, the first of equals; else ""."""
        return self._names.name_of(parse(ip))

    def judge_source(self, instance: str, ip: str) -> str:
        """Why not, or ""."""
        address = parse(ip)
        if address.is_unspecified or address.is_multicast:
            return f"source {ip}: no connection can leave from it"
        block = self.instance(instance)
        lists = [networks for networks in (self._sources, block.sources if block else None) if networks]
        if not lists and address.is_loopback:
            return f"source {ip}: loopback must be listed in source_ip"
        needed = _LOOPBACK_PREFIX[address.version] if address.is_loopback else 0
        if any(networks.longest_match(address) < needed for networks in lists):
            return f"source {ip} is not in source_ip"
        return ""

    def judge_destination(self, host: str, port: int) -> str:
        """Why not, or "", but for our own listeners."""
        if not any(low <= port <= high for low, high in self._ports):
            return f"{Endpoint(host, port)}: port {port} is not in destination_port"
        address = parse(host)
        if address in self._allowed_translated:
            return ""
        for form in forms(address):
            if self._denied.longest_match(form) > self._allowed.longest_match(form):
                return f"{Endpoint(host, port)} is in a denied range" + (f" (as {form})" if form != address else "")
        return ""


def _judge_route(
    source_verdict: Callable[[str, str], str],
    destination_verdict: Callable[[str, int], str],
    instance: str,
    source: str | None,
    destination: Endpoint,
) -> None:
    """`check_route`, but for our own listeners. What is granted is remembered, a refusal is raised anew."""
    if source is not None:
        if reason := source_verdict(instance, source):
            raise SourceNotAllowed(reason)
        if (":" in source) != destination.is_ipv6:
            raise FamilyMismatch(f"{source} and {destination} are not of the same address family")
    if reason := destination_verdict(destination.host, destination.port):
        raise DestinationNotAllowed(reason)


def _prepare(blocks: Mapping[str, InstanceSettings], instance: str) -> _Instance | None:
    block = blocks.get(instance)
    return _Instance(block) if block is not None else None


class _Instance:
    """The lists of one `instance` block, prepared."""

    __slots__ = ("clients", "single_sources", "sources")

    def __init__(self, block: InstanceSettings) -> None:
        self.clients = Networks(block.allow_from)
        self.sources = Networks(block.source_ip)
        #: At most one of each family: where a block lists several addresses or a network, none is "the" source.
        families = [[net for net in block.source_ip if net.version == version] for version in (4, 6)]
        self.single_sources = [
            str(nets[0].network_address)
            for nets in families
            if len(nets) == 1 and nets[0].prefixlen == nets[0].max_prefixlen
        ]


def _digests(secrets: Iterable[bytes]) -> tuple[bytes, ...]:
    # Digests have one length, so comparing them does not even tell a secret's length.
    return tuple(sha256(secret).digest() for secret in secrets)


def _listeners(settings: Settings) -> tuple[Endpoint, ...]:
    status = (settings.listen_status,) if settings.listen_status else ()
    return (*settings.listen, *settings.standard_doors, *status)


def _hosts_by_port(listeners: Iterable[Endpoint], breathe: Breathe) -> dict[int, set[str]]:
    hosts: dict[int, set[str]] = {}
    for listener in listeners:
        breathe()
        hosts.setdefault(listener.port, set()).add(canonical_ip(listener.host))
    return hosts
