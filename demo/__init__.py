"""`make demo`; see `__main__`."""
