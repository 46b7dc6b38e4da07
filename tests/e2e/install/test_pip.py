"""`make wheels`: both packages as an index takes them; and the program by pip on a fresh Debian."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from tests.debian import Machine, tree
from tests.e2e.install import mail
from tests.e2e.install.conftest import FRESH, made

pytestmark = [pytest.mark.either_form("it is the package that is asked which form it has"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory, and what was said; for Debian's own Python."""
    out = tmp_path_factory.mktemp("wheels")
    return out, made("wheels", out, "PYTHON=/usr/bin/python3")


def test_twine_finds_them_ready_for_the_index(wheels: tuple[Path, str]) -> None:
    """Tags that PyPI takes: it refuses `linux_x86_64`, which says nothing of the C library that is needed."""
    out, said = wheels
    assert said.count("PASSED") == 4, said
    names = sorted(path.name for path in out.iterdir())
    assert [name for name in names if "-linux_" in name] == []
    assert len([name for name in names if name.startswith("greenarrow_proxy-") and "manylinux_2_" in name]) == 1
    assert len([name for name in names if name.startswith("greenarrow_proxy_client-") and "-any.whl" in name]) == 1
    assert len([name for name in names if name.endswith(".tar.gz")]) == 2


def test_the_source_distribution_can_build_the_packages(wheels: tuple[Path, str]) -> None:
    (sdist,) = wheels[0].glob("greenarrow_proxy-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"packaging/debian/rules", "packaging/requirements.txt", "Containerfile", ".containerignore"} <= names


def test_a_fresh_debian_three_commands_and_mail_of_two_mtas(wheels: tuple[Path, str]) -> None:
    place = mail.place()
    with Machine(tree("bookworm", *FRESH)) as machine:
        (wheel,) = wheels[0].glob("greenarrow_proxy-*.whl")
        machine.put(wheel)
        with machine.typed(place.fill_in(mail.commands("pip"))) as shell:
            configuration = mail.wait_for_service(place, machine.root / "opt/greenarrow/greenarrow_proxy.conf", shell)
            mail.by_two_mtas(place, mail.secret_of(configuration))
        assert "stop: stopped" in machine.said
        version = machine.run("/opt/greenarrow/venv/bin/greenarrow_proxy", "--version").stdout
        assert "(relay: compiled, core: compiled)" in version

        # As a service, as the page says it.
        section = mail.PAGE.read_text().partition("As a service, with the user that the unit names:\n\n```\n")[2]
        machine.sh(section.partition("```")[0])
        mail.by_two_mtas(place, mail.secret_of(configuration))
        machine.run("systemctl", "reload", "greenarrow_proxy")
