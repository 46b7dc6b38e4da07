"""The parts of the benchmark; `bench/run.py` is the entry."""
