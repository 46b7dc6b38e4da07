"""What all tests need: no test of hypothesis is measured by a clock, whatever else the machine does meanwhile, and the
programs under test, which are started some hundred times, are compiled once."""

import os
import sys

from hypothesis import HealthCheck, settings

#: Over the profile that is in force: in continuous integration hypothesis itself chooses another.
settings.register_profile("untimed", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

#: Some machines set this; each start of a program would compile all of its modules then.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
