#!/usr/bin/env python3
"""GreenArrow Proxy: starts the program; everything is in `proxy.cli`."""

import sys

from proxy.cli import main

if __name__ == "__main__":
    sys.exit(main())
