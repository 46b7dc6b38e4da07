"""Both packages as others get them: built from a clean copy, sdist first and the wheel from it, and installed in fresh
environments, the client library beside PyPI's proxy.py too, whose package is named `proxy` like the program's."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import forms
from tests.program import SECRET, Proxy
from tests.sinks import Sink

pytestmark = [
    pytest.mark.either_form("builds, whose form is asked for in each of them"),
    pytest.mark.timeout(900),  # a compiler on a busy machine
]

ROOT = Path(__file__).resolve().parents[3]
#: One message through a real proxy, in an MTA's environment; it looks whose `proxy` and whether gevent is there.
SMOKE = """
import importlib.util, sys
if "gevent" in sys.argv:
    from gevent import monkey
    monkey.patch_all()
from greenarrow_proxy_client import Limits, Session
port, secret, mx = int(sys.argv[1]), sys.argv[2], (sys.argv[3], int(sys.argv[4]))
with Session(("127.0.1.1", port), secret, "server-a") as session:
    throttle = session.throttle("127.0.0.14", Limits("all", rates=[(1000, 60)], max_connections=2))
    with session.smtp([mx], "mail.example", source_ip="127.0.0.14", tls="none", throttles=[throttle]) as smtp:
        smtp.permit = throttle.acquire(timeout=30)
        assert smtp.sendmail("me@example.com", ["you@example.net"], b"Subject: hello\\r\\n\\r\\nHello.\\r\\n") == {}
if "proxy.py" in sys.argv:
    import proxy
    assert hasattr(proxy, "Proxy"), proxy
assert (importlib.util.find_spec("gevent") is not None) == ("gevent" in sys.argv)
assert not [name for name in sys.modules if name.split(".")[0] == "proxy" and "proxy.py" not in sys.argv]
print("sent")
"""

#: In mypyc's place.
MYPYC = """
import os, sys
def mypycify(paths, *, opt_level, **options):
    with open(os.environ["CALLS"], "a") as calls:
        print(next(word for word in sys.argv[1:] if not word.startswith("-")), opt_level, file=calls)
    return []
"""


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, **options)  # type: ignore[call-overload]


def done(*command: str | Path, **options: object) -> str:
    result = run(*command, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git has, and nothing that lies about here."""
    target = tmp_path_factory.mktemp("checkout") / "greenarrow_proxy"
    tracked = done("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def builder(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has what the program says it is built with, installed once for all."""
    requires = tomllib.loads((checkout / "pyproject.toml").read_text())["build-system"]["requires"]
    python = tmp_path_factory.mktemp("builder") / "env" / "bin" / "python"
    done(sys.executable, "-m", "venv", "--without-pip", python.parents[1])
    done(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *requires)
    return python


def wheel_of(project: Path, out: Path, builder: Path, **environ: str) -> tuple[Path, str]:
    """The project's wheel and what was said."""
    words = ["wheel", "-v", "--no-deps", "--no-build-isolation", "-w", out, project]
    said = done(sys.executable, "-m", "pip", "--python", builder, *words, env=forms.build_environ(**environ))
    (wheel,) = out.glob("*.whl")
    return wheel, said


def built(project: Path, out: Path) -> tuple[Path, Path, str]:
    """sdist, the wheel made from it in environments of their own, and what was said."""
    said = done(sys.executable, "-m", "build", "--outdir", out, project, env=forms.build_environ(CFLAGS="-O0"))
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel, said


@pytest.fixture(scope="module")
def program(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    return built(checkout, tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="module")
def library(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    return built(checkout / "client", tmp_path_factory.mktemp("library"))


def environment(directory: Path, *installs: str | Path) -> Path:
    """A fresh virtual environment's interpreter; the packages go in one by one, in this order."""
    done(sys.executable, "-m", "venv", "--without-pip", directory)
    python = directory / "bin" / "python"
    for each in installs:
        done(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", each)
    return python


def names(archive: Path) -> set[str]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return set(wheel.namelist())
    with tarfile.open(archive) as sdist:
        return {name.partition("/")[2] for name in sdist.getnames()}


# ---------------------------------------------------------------- the program


def test_the_source_distribution_holds_what_one_needs(program: tuple[Path, Path, str]) -> None:
    found = names(program[0])
    tracked = set(filter(None, done("git", "ls-files", "-z", cwd=ROOT).split("\0")))
    tracked = {name for name in tracked if (ROOT / name).is_file()}
    assert tracked - found == set()
    assert [
        name
        for name in found
        if name.endswith((".so", ".pyc", "_fastframes.c", "_fastrelay.c", "_fastsockets.c", "_fastdots.c"))
    ] == []


def test_the_wheel_of_the_source_distribution_has_the_compiled_relay(
    program: tuple[Path, Path, str], tmp_path: Path
) -> None:
    wheel = program[1]
    for twin in ("_fastframes", "_fastrelay", "_fastsockets"):
        assert [name for name in names(wheel) if name.startswith(f"proxy/net/{twin}.") and name.endswith(".so")]
    assert {name.split("/")[0].split(".")[0] for name in names(wheel) if not name.startswith("greenarrow_proxy-")} == {
        "proxy",
        "greenarrow_proxy",
        "greenarrow_proxy_core__mypyc",
    }
    python = environment(tmp_path / "env", wheel)
    command = python.with_name("greenarrow_proxy")
    assert "(relay: compiled, core: compiled)" in done(command, "--version", cwd=tmp_path)
    assert "throttle" in done(command, "--help", cwd=tmp_path)
    installed = tmp_path / "env" / "share" / "greenarrow_proxy" / "throttles"
    assert {path.name for path in installed.iterdir()} == {path.name for path in (ROOT / "etc" / "throttles").iterdir()}

    # The MTA's package of the same name comes into the same environment: one sentence, no traceback.
    done(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "proxy.py")
    result = run(command, "--version", cwd=tmp_path)
    assert result.returncode == 1
    assert "is not GreenArrow Proxy's" in result.stderr
    assert "virtual environment of its own" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_wheel_without_a_compiler_says_so(checkout: Path, builder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkout, copy)
    wheel, said = wheel_of(copy, tmp_path, builder, CC="/nonexistent/cc", **forms.A_FEW)
    for name in (
        "proxy.net._fastframes",
        "proxy.net._fastrelay",
        "proxy.net._fastsockets",
        "greenarrow_proxy_core__mypyc",
    ):
        assert f"warning: {name} was not compiled: Python code will run in its place" in said
    assert not [name for name in names(wheel) if name.endswith(".so")]


def test_what_an_earlier_build_left_does_not_come_back(checkout: Path, builder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkout, copy)
    pure = {forms.PURE: "1"}
    (copy / "proxy" / "soon_deleted.py").write_text("")
    assert "proxy/soon_deleted.py" in names(wheel_of(copy, tmp_path, builder, **pure)[0])
    (copy / "proxy" / "soon_deleted.py").unlink()
    assert "proxy/soon_deleted.py" not in names(wheel_of(copy, tmp_path, builder, **pure)[0])


def test_whatever_pip_asks_for_the_core_is_compiled_once(checkout: Path, builder: Path, tmp_path: Path) -> None:
    """It runs setup.py several times for one wheel. A stand-in for mypyc counts, and says how it was called."""
    (tmp_path / "mypyc").mkdir()
    (tmp_path / "mypyc" / "__init__.py").write_text("")
    (tmp_path / "mypyc" / "build.py").write_text(MYPYC)
    copy = tmp_path / "copy"
    shutil.copytree(checkout, copy)
    calls = tmp_path / "calls"
    environ = {"PYTHONPATH": str(tmp_path), "CALLS": str(calls), "CC": "/nonexistent/cc"}

    wheel_of(copy, tmp_path, builder, **environ)
    assert calls.read_text() == "bdist_wheel 0\n"
    calls.unlink()
    words = ("install", "--no-deps", "--no-build-isolation", "--config-settings", "editable_mode=compat", "--editable")
    usual = forms.build_environ(**environ, GREENARROW_PROXY_OPTIMISE="")
    done(sys.executable, "-m", "pip", "--python", builder, *words, copy, env=usual)
    assert calls.read_text() == "editable_wheel 3\n"
    calls.unlink()
    done(builder, "setup.py", "--quiet", "sdist", cwd=copy, env=usual)
    wheel_of(copy, tmp_path / "pure", builder, **environ, **{forms.PURE: "1"})
    assert not calls.exists()


def test_a_level_that_is_none_is_refused(checkout: Path) -> None:
    environ = forms.build_environ(GREENARROW_PROXY_OPTIMISE="fast")
    refused = run(sys.executable, "setup.py", "--version", cwd=checkout, env=environ)
    assert refused.returncode == 1
    assert refused.stderr == "GREENARROW_PROXY_OPTIMISE is 0, 1, 2 or 3, not 'fast'\n"


def test_the_locked_versions_are_those_that_the_program_wants(program: tuple[Path, Path, str]) -> None:
    """All dependencies of the wheel, and only versions that it allows; each file has its digest."""
    with zipfile.ZipFile(program[1]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = wheel.read(name).decode()
    text = (ROOT / "packaging" / "requirements.txt").read_text()
    locked = {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+) \\$", text, re.M)}
    assert len(locked) == len(re.findall(r"^[\w.-]+[=<>~]", text, re.M))
    assert text.count("--hash=sha256:") > len(locked)
    for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.M):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), line


# ---------------------------------------------------------------- the client library


def test_the_librarys_source_distribution_is_whole(library: tuple[Path, Path, str]) -> None:
    sdist, wheel, _ = library
    assert {"README.md", "LICENSE", "greenarrow_proxy_client/_shared/protocols/native/frames.py"} <= names(sdist)
    tops = {name.split("/")[0] for name in names(wheel) if ".dist-info/" not in name}
    assert tops == {"greenarrow_proxy_client"}
    assert "greenarrow_proxy_client/py.typed" in names(wheel)


@pytest.mark.parametrize("order", ["alone", "before proxy.py", "after proxy.py", "under gevent"])
def test_the_library_in_an_mtas_environment(library: tuple[Path, Path, str], tmp_path: Path, order: str) -> None:
    packages: dict[str, list[str | Path]] = {
        "alone": [library[1]],
        "before proxy.py": [library[1], "proxy.py"],
        "after proxy.py": ["proxy.py", library[1]],
        "under gevent": [library[1], "gevent"],
    }
    python = environment(tmp_path / "env", *packages[order])
    more = [word for word in ("gevent", "proxy.py") if word in order]
    with Proxy() as proxy, Sink() as sink:
        target = (str(proxy.native[1]), SECRET, *map(str, sink.endpoint))
        assert done(python, "-I", "-c", SMOKE, *target, *more, cwd=tmp_path) == "sent\n"
        assert len(sink.messages) == 1


def test_the_example_mta_in_an_environment_with_the_library_alone(
    library: tuple[Path, Path, str], tmp_path: Path
) -> None:
    """As the README calls it: nothing of a checkout beside its own files."""
    python = environment(tmp_path / "env", library[1])
    files = tmp_path / "clients"
    files.mkdir()
    for path in ROOT.glob("etc/clients/*queue*"):
        shutil.copy(path, files)
    (tmp_path / "secret").write_text(SECRET)
    with Proxy() as proxy, Sink() as sink:
        text = (files / "queue_sender.toml").read_text()
        for old, new in (
            ("10.0.0.1:807", "{}:{}".format(*proxy.native)),
            ("/etc/queue_sender.secret", str(tmp_path / "secret")),
            ("/var/spool/queue_sender", str(tmp_path / "queue")),
            ("198.51.100.7:25", "{}:{}".format(*sink.endpoint)),
            ("192.0.2.1", "127.0.0.14"),
        ):
            assert old in text
            text = text.replace(old, new)
        (files / "queue_sender.toml").write_text(text)
        mail = (tmp_path / "queue", "me@example.com", "you@yahoo.com")
        done(python, files / "mail_queue.py", *mail, cwd=tmp_path, input="Subject: hello\n\nHello.\n")
        done(python, files / "queue_sender.py", files / "queue_sender.toml", "--drain", cwd=tmp_path)
        assert [message.content for message in sink.messages] == [b"Subject: hello\r\n\r\nHello.\r\n"]
