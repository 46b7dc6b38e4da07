# Everything one does with this repository. A virtual environment is made when there is none; later calls are quick.
#
#   make demo         six MTAs send through the proxy on this machine, from four source addresses
#   make demo-cluster two proxies keep one limit together, and the store that holds it dies
#   make test         all tests but the slow ones, compiled, and what depends on that as Python code
#   make test-pure    the second half of it: as Python code
#   make check        formatting, lint, types
#   make bench-quick  a few minutes: a first look at the cost against HAProxy and others
#   make bench        the full tables of docs/performance/tables.md
#   make bench-stalls the longest stall of an innocent connection under each attack
#   make bench-handshakes what others wait beside 200 handshakes a second, and how many one and two threads make
#   make soak         the slow tests: leaks, long fuzzing
#   make sanitize     all C that is ours under AddressSanitizer and UndefinedBehaviorSanitizer (`make test` does the short part)
#   make deb          the Debian package for the Debian at hand, in dist/ (docs/install.md)
#   make pex          the program as one file for the Python at hand, in dist/
#   make wheels       program and client library as PyPI takes them, in dist/
#   make lock         newer versions of the libraries that packages bring with them, and their digests
#   make run          the proxy in the foreground; CONFIG=file (default: etc/greenarrow_proxy.conf)
#   make clean        everything that was made here, the virtual environment too

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
BUILT := $(VENV)/built
DIST ?= dist
CONFIG ?= etc/greenarrow_proxy.conf
PYTEST_ARGS ?=
# The tests wait for kernels, peers and processes most of the time: several run beside each other on one core.
WORKERS ?= $(shell echo $$(( 3 * $$(nproc) )))
# A file is one process's, and files are begun in the order of tests/conftest.py: xdist's own begins the longest last.
BY_FILE = --dist loadscope --no-loadscope-reorder

# Tests of one process that are run with two workers, too: sharing, limits, doors, ends.
WITH_WORKERS = $(addprefix tests/e2e/,sharing/test_sharing_throttles.py smtp/test_limits.py smtp/test_ends.py \
	doors/test_redirect.py doors/test_half_close.py doors/test_sources.py)

.PHONY: help demo demo-cluster test test-pure check bench bench-quick bench-stalls bench-handshakes soak sanitize deb pex wheels lock run clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

# What changes while it is built is not built: both are as old as their build's beginning.
$(READY): setup.py pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $(READY).begun
	@echo "Installing into $(VENV) (once; takes two to five minutes: it compiles) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat --editable '.[test]'
	@cp -p $(READY).begun $(BUILT)
	@mv $(READY).begun $(READY)

# What is compiled, again after a change: a minute or two. GREENARROW_PROXY_PURE=1 goes without it.
$(BUILT): $(READY) $(shell find proxy -name '*.py' -o -name '*.pyx')
	@touch $(BUILT).begun
	@test "$$GREENARROW_PROXY_PURE" = 1 || { echo "Compiling ..." && $(BIN)/python -m pip install --quiet \
		--disable-pip-version-check --config-settings editable_mode=compat --no-deps --editable . ; }
	@mv $(BUILT).begun $(BUILT)

demo: $(BUILT)
	@$(BIN)/python -m demo

demo-cluster: $(BUILT)
	@$(BIN)/python -m demo.cluster

test: $(BUILT)
	@tests/fetch_smtp_sink.sh
	@tests/fetch_node_peers.sh
	@$(BIN)/python -m pytest -m "not slow" --numprocesses $(WORKERS) $(BY_FILE) $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory test-pure
	@PROXY_TEST_WORKERS=2 $(BIN)/python -m pytest -m "not slow" --numprocesses $(WORKERS) $(WITH_WORKERS)

test-pure: $(READY)
	@tests/fetch_smtp_sink.sh
	@tests/fetch_node_peers.sh
	@GREENARROW_PROXY_PURE=1 $(BIN)/python -m pytest -m "not slow and not either_form" --numprocesses $(WORKERS) $(BY_FILE) \
		$(PYTEST_ARGS)

check: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: $(BUILT)
	@$(BIN)/python bench/run.py
	@$(BIN)/python bench/sharing.py
	@$(BIN)/python bench/workers.py

bench-stalls: $(BUILT)
	@ulimit -n $$(ulimit -H -n); $(BIN)/python bench/stalls.py

bench-handshakes: $(BUILT)
	@ulimit -n $$(ulimit -H -n); $(BIN)/python bench/stalls.py quiet handshakes handshakes-rsa mx-handshakes
	@$(BIN)/python bench/handshakes.py

bench-quick: $(BUILT)
	@$(BIN)/python bench/run.py --quick

soak: $(BUILT)
	@tests/fetch_smtp_sink.sh
	@tests/fetch_node_peers.sh
	@$(BIN)/python -m pytest -m slow --timeout 3600 $(PYTEST_ARGS)

sanitize: $(READY)
	@ulimit -n $$(ulimit -H -n); $(BIN)/python -m pytest --timeout 3600 tests/sanitized $(PYTEST_ARGS)

deb:
	@packaging/build_deb.sh $(DIST)

pex:
	@PYTHON=$(PYTHON) packaging/build_pex.sh $(DIST)

wheels:
	@PYTHON=$(PYTHON) packaging/build_wheels.sh $(DIST)

lock: $(READY)
	@PYTHON=$(BIN)/python packaging/lock.sh

run: $(BUILT)
	@exec $(BIN)/greenarrow_proxy --config-filename=$(CONFIG)

clean:
	rm -rf $(VENV) build dist bench/build .cache .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	rm -rf client/build client/greenarrow_proxy_client client/*.egg-info client/LICENSE
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f proxy/net/*.so proxy/net/*.c
