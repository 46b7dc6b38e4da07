"""A store that runs lease.lua itself (by Lua 5.1, as the real ones do) on hashes in memory, with a clock to be set.

It does what Valkey's documentation says of the few commands that the script uses, so time may be stepped, memory lost
or put back, and copies promoted. tests/loopback/store runs the same script on real servers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lupa.lua51

SOURCE = (Path(__file__).parents[3] / "proxy/store/lease.lua").read_text()


class FakeStore:
    """One server.

    Args:
        clock: true time, in nanoseconds.
        source: the script.

    Attributes:
        identity: as of run_id and master_replid. ahead: what its clock is ahead of the truth, in nanoseconds.
        calls: how often the script ran.
    """

    def __init__(self, clock: Callable[[], int], source: str = SOURCE) -> None:
        self._clock = clock
        self._lua = lupa.lua51.LuaRuntime(encoding=None, register_eval=False)
        table = self._lua.table_from({b"call": self._command})
        self._lua.globals()[b"redis"] = table
        self._script = self._lua.eval(f"function(KEYS, ARGV)\n{source}\nend".encode())
        self.identity = "first"
        self.ahead = 1_700_000_000 * 10**9
        self.hashes: dict[bytes, dict[bytes, bytes]] = {}
        self.expiries: dict[bytes, int] = {}
        self.calls = 0

    def run(self, keys: Sequence[bytes], arguments: Sequence[bytes | int]) -> list[Any]:
        self.calls += 1
        texts = [b"%d" % each if isinstance(each, int) else each for each in arguments]
        self._declared = set(keys)
        reply = self._script(self._lua.table_from(list(keys)), self._lua.table_from(texts))
        return [int(each) if isinstance(each, float) else each for each in reply.values()]

    # --- accidents ---

    def flush(self) -> None:
        self.hashes.clear()
        self.expiries.clear()

    def snapshot(self) -> tuple[dict[bytes, dict[bytes, bytes]], dict[bytes, int]]:
        return copy.deepcopy((self.hashes, self.expiries))

    def restart(self, snapshot: tuple[dict[bytes, dict[bytes, bytes]], dict[bytes, int]], identity: str) -> None:
        """With what was saved then, as another run, or another server in its place."""
        self.hashes, self.expiries = copy.deepcopy(snapshot)
        self.identity = identity

    # --- commands ---

    def _time(self) -> int:
        return (self._clock() + self.ahead) // 1000

    def _hash(self, key: bytes) -> dict[bytes, bytes]:
        assert key in self._declared, "a script touches only the keys that it declares"
        if self.expiries.get(key, self._time() + 1) <= self._time():
            self.hashes.pop(key, None)
            del self.expiries[key]
        return self.hashes.setdefault(key, {})

    def _command(self, name: bytes, *words: Any) -> Any:
        if name == b"TIME":
            seconds, rest = divmod(self._time(), 1_000_000)
            return self._lua.table_from([b"%d" % seconds, b"%d" % rest])
        key, *rest = (each if isinstance(each, bytes) else b"%.17g" % each for each in words)
        fields = self._hash(key)
        if name == b"HGETALL":
            return self._lua.table_from([each for pair in fields.items() for each in pair])
        if name == b"HSET":
            fields.update(zip(rest[::2], rest[1::2], strict=True))
        elif name == b"HDEL":
            for field in rest:
                fields.pop(field, None)
        elif name == b"DEL":
            self.hashes.pop(key, None)
            self.expiries.pop(key, None)
        elif name == b"PEXPIRE":
            assert rest[0].lstrip(b"-").isdigit(), "PEXPIRE takes whole milliseconds"
            if fields:
                self.expiries[key] = self._time() + int(rest[0]) * 1000
        else:
            raise AssertionError(name)
        return None
