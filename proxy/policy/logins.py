"""Which of several secrets each client has proven itself with, so that an old one goes when nobody uses it any more.

Pure and bounded. Of a secret only its hash is kept; which number it has is asked of the rules in force, since a reload
may put others in front of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from typing import NamedTuple

#: Names, addresses and secrets that belong together; who has not come for longest is forgotten first.
MOST = 1000


class _Key(NamedTuple):
    instance: str
    host: str
    digest: bytes


class Entry(NamedTuple):
    """What is kept of a client with a secret. `logins`: how often; `at`: of the last one."""

    instance: str
    host: str
    digest: bytes
    logins: int
    at: float


class Known(NamedTuple):
    """One client with one secret.

    Args:
        secret: its number, from 1 in the order of the configuration; 0: it is no longer one of them.
        latest: the client has not come with another one since.
        logins, ago: how often, and seconds since the last time.
    """

    instance: str
    host: str
    secret: int
    latest: bool
    logins: int
    ago: float


class Logins:
    """The table; whoever has proven a secret is entered.

    Args:
        entries: of other tables, to begin with: all of them together.
    """

    def __init__(self, entries: Iterable[Entry] = (), most: int = MOST) -> None:
        self._seen: OrderedDict[_Key, tuple[int, float]] = OrderedDict()
        self._most = most
        for entry in sorted(entries, key=lambda entry: entry.at):
            self._enter(_Key(*entry[:3]), entry.logins, entry.at)

    def proven(self, instance: str, host: str, secret: bytes, now: float) -> None:
        """A client from `host` is this instance, by this secret."""
        self.shown(instance, host, sha256(secret).digest(), now)

    def shown(self, instance: str, host: str, digest: bytes, now: float) -> None:
        """The same for the SHA-256 digest of the secret."""
        self._enter(_Key(instance, host, digest), 1, now)

    def entries(self) -> list[Entry]:
        """All of it, who came last in the last place."""
        return [Entry(*key, count, at) for key, (count, at) in self._seen.items()]

    def _enter(self, key: _Key, count: int, now: float) -> None:
        before, _ = self._seen.get(key, (0, 0.0))
        self._seen[key] = before + count, now
        self._seen.move_to_end(key)
        if len(self._seen) > self._most:
            self._seen.popitem(last=False)

    def known(self, secrets_of: Callable[[str], Sequence[bytes]], now: float) -> Iterator[Known]:
        """All of it, who came last in front.

        Args:
            secrets_of: the secrets that prove a name now.
        """
        clients = set()
        for key, (count, at) in reversed(self._seen.items()):
            digests = [sha256(secret).digest() for secret in secrets_of(key.instance)]
            number = digests.index(key.digest) + 1 if key.digest in digests else 0
            client = key.instance, key.host
            yield Known(*client, number, client not in clients, count, now - at)
            clients.add(client)
