"""`make demo`; see `__main__`."""

import sys
from pathlib import Path

# The example MTA is a program beside its configuration, not a package.
sys.path.append(str(Path(__file__).resolve().parents[1] / "etc" / "clients"))
