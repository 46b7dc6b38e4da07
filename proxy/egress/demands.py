"""What TLS with a receiver has to be: what its client wishes, joined with what the operator's `tls` blocks say.

A client of the native protocol that demands something itself knows better, and is left alone. Else a block may ask for
more than it, never for less, but where TLS was only welcome. In mode smtp nobody has said anything, and the block
holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import monotonic

from proxy.egress.receiver import Wish
from proxy.errors import Step, UpstreamError
from proxy.model import UNNAMED, Endpoint, Names, TlsMode
from proxy.net.contexts import ClientIdentity
from proxy.policy.certificates import Demand, Result
from proxy.policy.dane import Found
from proxy.policy.tls_rules import TlsRule, TlsRules

#: Seconds to wait for the first answer of a domain, of whose blocks nobody knows before for which addresses they hold.
_FIRST_ANSWER = 5.0
_LEVELS = {"none": TlsMode.NONE, "opportunistic": TlsMode.OPPORTUNISTIC, "required": TlsMode.REQUIRED}


class Demands:
    """Of one configuration. Its calls may wait for DNS, where a block says `dane`, and for the first answer of a
    domain that a block names.

    Args:
        tlsa: see `TlsaLookUps.get`.
        hear_of: see `LookUps.hear_of`.
        shown: the certificate that receivers are shown by who leaves from an address, if they ask for one.
    """

    def __init__(
        self,
        rules: TlsRules,
        tlsa: Callable[[str, int, float], Found],
        hear_of: Callable[[frozenset[str], float], None],
        shown: Callable[[str], ClientIdentity | None],
    ) -> None:
        self._rules = rules
        self._shown = shown
        self._tlsa = tlsa
        self._hear_of = hear_of

    def join(
        self,
        wish: Wish,
        instance: str,
        source: str,
        destination: Endpoint,
        seconds: float,
        names: Names = UNNAMED,
        said: bool = False,
    ) -> Wish:
        """The wish as it is to be fulfilled.

        Args:
            seconds: the longest to wait for DNS.
            names: what the client says of its receiver.
            said: `wish.tls` is the client's own word.

        Raises:
            UpstreamError: the records cannot be had, or are required and not there; nothing may be sent (RFC 7672).
        """
        joined = self._joined(wish, instance, source, destination, seconds, names, said)
        if joined.tls is TlsMode.NONE:
            return joined
        identity = self._shown(source)
        return joined if identity is joined.identity else joined._replace(identity=identity)

    def _joined(
        self, wish: Wish, instance: str, source: str, destination: Endpoint, seconds: float, names: Names, said: bool
    ) -> Wish:
        if not self._rules or (said and (_demanding(wish) or wish.tls is TlsMode.NONE)):
            return wish
        self._hear_of(self._rules.domains, min(seconds, _FIRST_ANSWER))
        rule = self._rules.match(instance, source, destination.host, names)
        if rule is None:
            return wish
        wish = wish._replace(tls=_mode(rule, wish.tls, said), minimum=rule.minimum, ciphers=rule.ciphers)
        if wish.tls is TlsMode.NONE:
            return wish._replace(minimum="", ciphers="")
        if rule.dane:
            return self._dane(rule, wish, source, destination, seconds)
        known = (wish.tls_server_name,) if wish.tls_server_name else rule.hosts
        wish = wish._replace(tls_server_name=known[0] if known else "")
        if rule.level == "verify":
            return wish._replace(demand=Demand(rule.names or known or (destination.host,), authority=True))
        return wish._replace(demand=Demand(known))

    def _dane(self, rule: TlsRule, wish: Wish, source: str, destination: Endpoint, seconds: float) -> Wish:
        """With the records of all hosts that the receiver may be; nearly always that is one."""
        ends = monotonic() + seconds
        hosts = rule.hosts or ((wish.tls_server_name,) if wish.tls_server_name else ())
        answers = [self._tlsa(host, destination.port, ends - monotonic()) for host in hosts]
        with_records = [answer for answer in answers if answer.records]
        if with_records:
            bases = [answer.base for answer in with_records]
            records = tuple(dict.fromkeys(record for answer in with_records for record in answer.records))
            demand = Demand(tuple(dict.fromkeys((*rule.names, *bases, *hosts))), tlsa=records)
            mode = TlsMode.REQUIRED if wish.tls is TlsMode.OPPORTUNISTIC else wish.tls
            return wish._replace(tls=mode, tls_server_name=bases[0], demand=demand)
        if failed := _failure(answers):
            raise _refusal(rule, source, destination, failed, Result.DNSSEC_INVALID)
        if rule.level == "dane-only":
            why = "; ".join(answer.why for answer in answers) or "it is not known which MX host this is"
            raise _refusal(rule, source, destination, why, Result.DANE_REQUIRED)
        known = hosts[0] if hosts else ""
        return wish._replace(tls_server_name=known, demand=Demand((known,) if known else ()))


def _demanding(wish: Wish) -> bool:
    return wish.demand.mandatory or bool(wish.minimum or wish.ciphers)


def _mode(rule: TlsRule, mode: TlsMode, said: bool) -> TlsMode:
    if mode is TlsMode.IMPLICIT or rule.level is None or (said and mode is TlsMode.REQUIRED):
        return mode
    if rule.dane:
        return TlsMode.REQUIRED if rule.level == "dane-only" else TlsMode.OPPORTUNISTIC
    return _LEVELS.get(rule.level, TlsMode.REQUIRED)


def _failure(answers: Iterable[Found]) -> str:
    return "; ".join(answer.failure for answer in answers if answer.failure)


def _refusal(rule: TlsRule, source: str, destination: Endpoint, why: str, result: Result) -> UpstreamError:
    reason = f"tls {rule.block}: {why}"
    return UpstreamError(f"{Step.TLS} {source} -> {destination}: {reason}", Step.TLS, reason=reason, tls_result=result)
