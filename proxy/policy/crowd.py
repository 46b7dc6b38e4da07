"""A bounded crowd, fair by address: who is to go when there is no room for one more.

Out goes one from the address that has most in the crowd, and of that address the one that came first: whoever floods us
pushes out its own, however fast it is, and an address that holds little is not touched. All of an IPv6 /64 belongs to
one owner and counts as one address. Pure; what being put out means is the caller's.
"""

from __future__ import annotations

from collections.abc import Hashable

from proxy.model import owner_of


class Crowd:
    """Who is in it, by owner. Each step costs the same, however many there are.

    Args:
        limit: how many there may be.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._owners: dict[Hashable, str] = {}
        self._members: dict[str, dict[Hashable, None]] = {}  # owner → its own, in the order in which they came
        self._by_number: dict[int, dict[str, None]] = {}  # how many → the owners that have so many
        self._most = 0

    def __len__(self) -> int:
        return len(self._owners)

    def __contains__(self, who: Hashable) -> bool:
        return who in self._owners

    def number_of(self, address: str) -> int:
        """How many of this address's owner are in."""
        return len(self._members.get(owner_of(address), ()))

    @property
    def most(self) -> int:
        """How many the owner has that has most."""
        return self._most

    def enter(self, who: Hashable, address: str) -> Hashable | None:
        """Let one in, who was not in.

        Returns:
            Who had to go for that, perhaps the very one; None: there was room.
        """
        owner = owner_of(address)
        members = self._members.setdefault(owner, {})
        members[who] = None
        self._owners[who] = owner
        self._renumber(owner, len(members) - 1, len(members))
        return self.put_out() if len(self._owners) > self.limit else None

    def leave(self, who: Hashable) -> bool:
        """One goes by itself; False: it was not in."""
        owner = self._owners.pop(who, None)
        if owner is None:
            return False
        members = self._members[owner]
        del members[who]
        self._renumber(owner, len(members) + 1, len(members))
        if not members:
            del self._members[owner]
        return True

    def put_out(self) -> Hashable:
        """The one that has to go next goes; there must be one."""
        owner = next(iter(self._by_number[self._most]))
        who = next(iter(self._members[owner]))
        self.leave(who)
        return who

    def _renumber(self, owner: str, before: int, after: int) -> None:
        """An owner has one more, or one less."""
        if before:
            del self._by_number[before][owner]
        if after:
            self._by_number.setdefault(after, {})[owner] = None
        if before and not self._by_number[before]:
            del self._by_number[before]
        if after > self._most or self._most not in self._by_number:
            self._most = after
