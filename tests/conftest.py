"""What all tests need: no test of hypothesis is measured by a clock, whatever else the machine does meanwhile."""

from hypothesis import HealthCheck, settings

#: Over the profile that is in force: in continuous integration hypothesis itself chooses another.
settings.register_profile("untimed", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
