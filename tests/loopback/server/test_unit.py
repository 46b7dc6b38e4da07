"""What `--check-config` reads from the installed unit: user, low ports, descriptors, in systemd's own order."""

from pathlib import Path

import pytest

from proxy.server.unit import FOLDERS, Unit, installed

ROOT = Path(__file__).resolve().parents[3]
SERVICE = """\
[Service]
# User=commented
User=first
AmbientCapabilities=CAP_NET_BIND_SERVICE
LimitNOFILE=1024:4096
"""


@pytest.fixture
def folders(tmp_path):
    """As /etc and /lib: what counts first in front."""
    for name in ("etc", "lib"):
        (tmp_path / name / "greenarrow_proxy.service.d").mkdir(parents=True)
    return tmp_path / "etc", tmp_path / "lib"


def test_there_is_none(folders):
    (folders[0] / "greenarrow_proxy.service.d" / "alone.conf").write_text("[Service]\nUser=nobody\n")
    assert installed(folders) == Unit()


def test_the_unit_that_we_ship(folders):
    (folders[1] / "greenarrow_proxy.service").write_text((ROOT / "etc" / "greenarrow_proxy.service").read_text())
    assert installed(folders) == Unit("greenarrow-proxy", True, 262144)


def test_what_the_unit_says(folders):
    (folders[1] / "greenarrow_proxy.service").write_text(SERVICE)
    assert installed(folders) == Unit("first", True, 4096)


def test_a_unit_in_etc_hides_the_packages(folders):
    (folders[1] / "greenarrow_proxy.service").write_text(SERVICE)
    (folders[0] / "greenarrow_proxy.service").write_text("[Service]\nUser = second\nLimitNOFILE=infinity\n")
    assert installed(folders) == Unit("second")


def test_drop_ins_come_by_their_names_whatever_their_folder(folders):
    etc, lib = folders
    (lib / "greenarrow_proxy.service").write_text(SERVICE)
    (lib / "greenarrow_proxy.service.d" / "20.conf").write_text("[Service]\nUser=twenty\nLimitNOFILE=20\n")
    (etc / "greenarrow_proxy.service.d" / "10.conf").write_text(
        "[Service]\nUser=ten\nLimitNOFILE=10\nAmbientCapabilities=\n"
    )
    assert installed(folders) == Unit("twenty", False, 20)


def test_a_drop_in_in_etc_hides_one_of_its_name(folders):
    etc, lib = folders
    (lib / "greenarrow_proxy.service").write_text(SERVICE)
    (lib / "greenarrow_proxy.service.d" / "a.conf").write_text("[Service]\nUser=hidden\n")
    (etc / "greenarrow_proxy.service.d" / "a.conf").write_text("")
    assert installed(folders).user == "first"


def test_the_administrators_folder_counts_first():
    assert FOLDERS[0] == Path("/etc/systemd/system")
