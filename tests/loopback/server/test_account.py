"""As whom a check looks: the service's user with what its unit gives, each time in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
#: Becomes the service, and says what it may; nothing is imported afterwards.
PROBE = """
import os, resource, socket, sys
from proxy.server.account import check_as
from proxy.server.unit import Unit
user = check_as({user!r}, {unit})
with socket.socket() as probe:
    try:
        probe.bind(("127.0.9.3", 807))
        low = True
    except PermissionError:
        low = False
try:
    os.kill(1, 0)
    mighty = True
except PermissionError:
    mighty = False
print(user, os.geteuid() == 0, low, mighty, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
"""


def became(user, unit):
    if os.geteuid():
        pytest.skip("only root can become another user")
    script = PROBE.format(user=user, unit=unit)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("user", [None, "nobody"])
def test_a_unit_gives_low_ports_and_descriptors_and_nothing_else(user):
    assert became(user, 'Unit("nobody", True, 777)') == ["nobody", "False", "True", "False", "777"]


def test_a_unit_without_the_right_to_low_ports():
    assert became(None, 'Unit("nobody", False, 777)') == ["nobody", "False", "False", "False", "777"]


def test_another_user_than_the_units_gets_nothing_of_it():
    user, root, low, mighty, descriptors = became("daemon", 'Unit("nobody", True, 777)')
    assert (user, root, low, mighty) == ("daemon", "False", "False", "False")
    assert descriptors != "777"


def test_without_a_unit_we_stay_who_we_are():
    script = PROBE.format(user=None, unit="Unit()").replace("print(user,", 'print(user or "-",')
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split()[:2] == ["-", str(os.geteuid() == 0)], done.stderr
