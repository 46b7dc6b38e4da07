"""Runs things: the sink, the candidates, the generator; one sample at a time. Judges nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from harness import authenticated
from harness.builds import GENERATOR
from harness.candidates import SECRET, SINK, TLS_SINK, Candidate, Unavailable, certificate
from harness.machine import BUILD, ROOT, Cores, pinned
from harness.workload import Workload

Sample = dict[str, Any]
"""One measurement: the generator's JSON object, or {"failed": reason}."""

_START_TIMEOUT = 15.0
_STOP_TIMEOUT = 5.0
_SAMPLE_TIMEOUT = 180.0
_ERRORS_ALLOWED = 0.005  # of the units; more than that and the sample is none
_OF_THE_PROXY = {"cpu_us_per_unit", "kb_per_connection", "rss_kb_per_connection", "idle_cpu_percent"}


class Running:
    """A candidate's process tree, pinned to the proxy's core."""

    def __init__(self, candidate: Candidate, cores: Cores) -> None:
        self.candidate = candidate
        self.directory = BUILD / "run" / candidate.name
        self.directory.mkdir(parents=True, exist_ok=True)
        self.log = self.directory / "output.log"
        self.beside: list[Any] = []  # what a driver holds open beside the load, as long as this process runs
        self._reader: subprocess.Popen[bytes] | None = None
        self._process = self._start(cores) if candidate.command else None
        if self._process:
            try:
                self._wait_until_it_listens()
            except BaseException:
                self.stop()
                raise

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def _door(self) -> tuple[str, int]:
        door = self.candidate.door("any")
        assert door is not None
        host, port = door.address.split(":")
        return host, int(port)

    @property
    def ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def _start(self, cores: Cores) -> subprocess.Popen[bytes]:
        assert self.candidate.command is not None
        host, port = self._door
        with contextlib.suppress(OSError), socket.create_connection((host, port), 1):
            raise Unavailable(f"somebody else listens on {host}:{port}, and would be measured in its place")
        command = pinned(cores.proxy, self.candidate.command(self.candidate, self.directory))
        with self.log.open("wb") as log:
            output: Any = log
            if self.candidate.reads_stdout:
                self._reader = subprocess.Popen(
                    pinned(cores.load, self.candidate.reader), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
                )
                output = self._reader.stdin
            environ = os.environ | dict(self.candidate.environ)
            process = subprocess.Popen(
                command, stdout=output, stderr=log, cwd=ROOT, env=environ, start_new_session=True
            )
        if self._reader and self._reader.stdin:
            self._reader.stdin.close()  # the candidate alone holds the pipe: when it ends, so does the reader
        return process

    def _wait_until_it_listens(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_TIMEOUT
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(self._door, 1):
                return
            time.sleep(0.05)
        lines = self.log.read_text(errors="replace").strip().splitlines()
        raise Unavailable(f"it did not start: {lines[-1][-200:] if lines else 'it said nothing'} (see bench/build/run)")

    def stop(self) -> None:
        for held in self.beside:
            held.close()
        for process in filter(None, (self._process, self._reader)):
            with contextlib.suppress(ProcessLookupError):
                if process is self._process:
                    os.killpg(process.pid, signal.SIGTERM)  # Dante has children of its own
            try:
                process.wait(_STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill() if process is self._reader else os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class Bench:
    """Holds what is running; a context manager that leaves nothing behind."""

    def __init__(self, cores: Cores, quick: bool) -> None:
        self.cores = cores
        self.quick = quick
        self._sink: subprocess.Popen[str] | None = None
        self._running: dict[str, Running] = {}
        self._helpers: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Bench:
        os.sched_setaffinity(0, {self.cores.load})  # drivers in Python run here; children are pinned one by one
        command = pinned(self.cores.load, [str(GENERATOR), "sink", "--target", SINK])
        self._sink = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._sink.stdout is not None
        if self._sink.stdout.readline().strip() != "ready":
            raise SystemExit(f"bench: the sink cannot listen on {SINK}")
        return self

    def __exit__(self, *_: object) -> None:
        for running in self._running.values():
            running.stop()
        self._running.clear()
        for process in filter(None, (self._sink, *self._helpers.values())):
            process.terminate()
            process.wait()

    def stop_all_but(self, names: Collection[str]) -> None:
        """What is not measured any more shall not wake up beside what is."""
        for name in [name for name in self._running if name not in names]:
            self._running.pop(name).stop()

    def helper(self, name: str, command: list[str]) -> None:
        """Has a program of the outer world run until the end; it says "ready" first."""
        if name not in self._helpers:
            process = subprocess.Popen(pinned(self.cores.load, command), stdout=subprocess.PIPE, text=True)
            self._helpers[name] = process
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise SystemExit(f"bench: {name} does not start")

    def tls_sink(self) -> tuple[str, int]:
        """An MX that offers STARTTLS, with a key on P-256."""
        if "tls-sink" not in self._helpers:
            directory = BUILD / "run" / "tls-sink"
            directory.mkdir(parents=True, exist_ok=True)
            key, shown = certificate(directory)
            command = [str(GENERATOR), "sink", "--target", TLS_SINK, "--certificate", str(shown), "--key", str(key)]
            self.helper("tls-sink", command)
        host, port = TLS_SINK.split(":")
        return host, int(port)

    def _sink_of(self, workload: Workload) -> subprocess.Popen[str]:
        if workload.sink == TLS_SINK:
            self.tls_sink()
            return self._helpers["tls-sink"]
        assert self._sink is not None
        return self._sink

    def candidate(self, candidate: Candidate, fresh: bool = False, sink: str = SINK) -> Running:
        """The running candidate, started and warmed up when needed.

        Raises:
            Unavailable: a program is missing, or it does not start.
        """
        running = self._running.get(candidate.name)
        if running and (fresh or running.ended):
            self._running.pop(candidate.name).stop()
        if candidate.name not in self._running:
            running = self._running[candidate.name] = Running(candidate, self.cores)
            if candidate.for_generator:
                warm_up = Workload(
                    "warm-up", "", "load", ("--connections", "50", "--sessions", "300"), (), (), sink=sink
                )
                self.generate(warm_up, running, warm_up.arguments)
        return self._running[candidate.name]

    def generator_command(self, workload: Workload, running: Running, arguments: tuple[str, ...]) -> list[str]:
        door = running.candidate.door(workload.door)
        if door is None:
            raise Unavailable(f"it has no {workload.door} door")
        command = [str(GENERATOR), workload.mode, "--target", workload.sink, "--proxy", door.address, *door.arguments]
        command += ["--core", str(self.cores.load), "--sink-pid", str(self._sink_of(workload).pid), *arguments]
        command += ["--beside"] if workload.beside else []
        return command + (["--watch", str(running.pid)] if running.pid else [])

    def generate(self, workload: Workload, running: Running, arguments: tuple[str, ...]) -> Sample:
        """One run of the generator against one candidate."""
        command = self.generator_command(workload, running, arguments)
        if "native" not in command:
            return self.run_generator(command, running)
        count = int(arguments[arguments.index("--connections") + 1])
        with authenticated.channels(("127.0.0.1", running.candidate.door_port("native")), SECRET, count) as fds:
            return self.run_generator([*command, "--fds", ",".join(map(str, fds))], running, fds)

    def run_generator(self, command: list[str], running: Running, fds: Sequence[int] = ()) -> Sample:
        """Run it with these descriptors; its report."""
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_SAMPLE_TIMEOUT, check=False, pass_fds=fds
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"no end within {_SAMPLE_TIMEOUT:.0f} s"}
        if done.returncode:
            return {"failed": done.stderr.strip() or f"generator: exit {done.returncode}"}
        sample: Sample = json.loads(done.stdout)
        if running.pid is None:
            sample = {key: value for key, value in sample.items() if key not in _OF_THE_PROXY}
        if sample["errors"] > _ERRORS_ALLOWED * (sample["units"] + sample["errors"]):
            return sample | {"failed": f"{sample['errors']} errors in {sample['units']} units"}
        return sample

    @contextlib.contextmanager
    def idle_relays(self, workload: Workload, running: Running) -> Iterator[None]:
        """Holds the workload's idle relays open through the candidate."""
        if not workload.idle_relays:
            yield
            return
        idle = Workload("idle", "", "idle", ("--connections", str(workload.idle_relays)), (), (), door=workload.door)
        command = self.generator_command(idle, running, idle.arguments)
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            ready = holder.stdout.readline().split()
            if ready != ["ready", str(workload.idle_relays)]:
                raise Unavailable(f"of {workload.idle_relays} idle relays: {' '.join(ready)}")
            yield
        finally:
            holder.stdin.close()
            holder.wait()
            holder.stdout.close()

    def sample(self, workload: Workload, candidate: Candidate) -> Sample:
        """Measures once. A failure is a sample too: the others go on.

        Raises:
            Unavailable: the candidate cannot be had here at all.
        """
        running = self.candidate(candidate, workload.fresh, workload.sink)
        if workload.measure:
            return workload.measure(self, running)
        beside = workload.beside(self, running) if workload.beside else self.idle_relays(workload, running)
        with beside:
            sample = self.generate(workload, running, workload.quick if self.quick else workload.arguments)
        return workload.after(self, running, sample) if workload.after and "failed" not in sample else sample


def version_of(candidate: Candidate) -> str | None:
    """What the program says of itself, first line."""
    if not candidate.version:
        return None
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    try:
        done = subprocess.run(
            candidate.version, capture_output=True, text=True, env=os.environ | {"PATH": path}, check=False
        )
    except OSError:
        return None
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[0] if lines else None
