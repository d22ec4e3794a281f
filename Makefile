# Two commands matter: `make demo` shows the whole way of a reading without hardware, `make test` proves it.
# Everything that they need on a fresh Debian or Raspberry Pi OS machine is installed by their own steps.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
UPY    := build/upy
SUDO   := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

# micropython-umqtt.simple 1.3.4 as the registry has it; pip refuses its sdist, pipkin unpacks it.
UMQTT        := micropython-umqtt.simple==1.3.4
UMQTT_SHA256 := $(shell cat device/umqtt.sha256)

.PHONY: help demo test quick prove lint servers clean

help:
	@echo "make demo [SECONDS=40]  the whole way on this machine: no hardware, no root"
	@echo "make test               install what the tests need (mosquitto, rabbitmq by apt), then run everything"
	@echo "make quick              the quick part of the tests"
	@echo "make prove              long proofs and benchmarks, some hours; writes tests/mutations/REPORT.md,"
	@echo "                        tests/faults/DAMAGE.md, CRASH.md, REPORT.md and tests/bench/RESULTS.md"

demo: $(VENV)/demo.stamp $(UPY)/umqtt/simple.py
	@FIELDPOST_UMQTT=$(CURDIR)/$(UPY) $(BIN)/fieldpost demo $(if $(SECONDS),--seconds $(SECONDS))

test: servers $(VENV)/test.stamp $(UPY)/umqtt/simple.py lint
	$(BIN)/python -m pytest

quick: $(VENV)/test.stamp $(UPY)/umqtt/simple.py
	$(BIN)/python -m pytest -m "not slow"

prove: servers $(VENV)/test.stamp $(UPY)/umqtt/simple.py
	$(BIN)/python -m tests.edge.test_spool_model
	$(BIN)/python -m tests.mutations
	$(BIN)/python -m tests.faults.damage
	$(BIN)/python -m tests.faults.crash
	$(BIN)/python -m tests.faults
	$(BIN)/python -m tests.bench

lint: $(VENV)/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Debian starts both as services, which the tests do not use: they start their own on free ports. A C compiler makes
# the shims that fail system calls and hold clocks; a small file system of their own is filled to the brim.
servers:
	@if ! command -v mosquitto >/dev/null && ! [ -x /usr/sbin/mosquitto ] || ! [ -x /usr/sbin/rabbitmq-server ] \
	  || ! command -v cc >/dev/null || ! [ -e /usr/include/stdio.h ] \
	  || ! command -v mkfs.ext4 >/dev/null && ! [ -x /usr/sbin/mkfs.ext4 ]; then \
	  set -x; $(SUDO) apt-get update -qq && \
	  $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    mosquitto rabbitmq-server iproute2 gcc libc6-dev e2fsprogs; \
	fi

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

# Editable, so that a change is seen without another install, by the demo and by the tests.
$(VENV)/demo.stamp: $(VENV)/bin/pip pyproject.toml
	@echo "installing into $(VENV) ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[demo]'
	@touch $@

$(VENV)/test.stamp: $(VENV)/bin/pip pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

$(UPY)/umqtt/simple.py: device/umqtt.sha256 | $(VENV)/bin/pip
	@$(BIN)/pip install --quiet --disable-pip-version-check pipkin==2.2b1
	@rm -rf $(UPY) && mkdir -p $(UPY)
	@$(BIN)/pipkin --quiet --dir $(UPY) install --no-mp-org $(UMQTT) >build/pipkin.log 2>&1 || { cat build/pipkin.log; exit 1; }
	@echo "$(UMQTT_SHA256)  $(UPY)/umqtt/simple.py" | sha256sum --check --quiet \
	  || { rm -rf $(UPY); echo "umqtt.simple is not the one that we know: see device/umqtt.sha256" >&2; exit 1; }

clean:
	rm -rf $(VENV) build dist
