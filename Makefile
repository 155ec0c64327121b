# The only door: everything a developer or a machine runs is a target here. `make help` lists them.
# Each target installs what it lacks and is quick when nothing is missing.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

VENV ?= .venv
ifndef PYTHON
PYTHON := $(shell tools/find-python.sh)
endif
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
PYTEST_ARGS ?=
# The tests of one module run in one process after each other; PARALLEL= runs all in one.
PARALLEL ?= --numprocesses auto --dist loadfile --no-loadscope-reorder
BENCH_ARGS ?=
TEETH ?=
C_SOURCES := $(wildcard incfs/*.c incfs/*.h)
# Each command that a test runs is a process, which would compile all of incfs by itself.
unexport PYTHONDONTWRITEBYTECODE
# Compared with mkfs and losetup, a user's PATH may lack the sbin directories; the tests call both.
export PATH := $(CURDIR)/$(BIN):$(PATH):/usr/local/sbin:/usr/sbin:/sbin

.PHONY: help man setup system system-demo system-test system-bench system-vm test lint sweep demo bench bench-quick wheel clean sanitize damage-long \
	crash-long kill-long full-long teeth teeth-some soak test-vm test-vm-some

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.extension-built ## install what is missing, make the virtual environment, build and install incfs into it

system:
	@tools/system-packages.sh setup $(PYTHON)

system-demo: system
	@tools/system-packages.sh demo $(PYTHON)

system-test: system
	@tools/system-packages.sh test $(PYTHON)

system-bench: system-test
	@tools/system-packages.sh bench $(PYTHON)

system-vm: system-test
	@tools/system-packages.sh vm $(PYTHON)

# Order-only: the packages are looked at each time (milliseconds), but rebuild nothing by themselves.
$(VENV)/.installed: pyproject.toml setup.py | system
	@$(BIN)/python -c '' 2>/dev/null || { echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "installing incfs and its libraries into $(VENV)"
	@$(PIP) install --upgrade 'pip>=24'
	@INCFS_WERROR=1 $(PIP) install --editable '.[test]'
	@touch $@

$(VENV)/.extension-built: $(VENV)/.installed $(C_SOURCES)
	@echo "building the C extension"
	@INCFS_WERROR=1 $(BIN)/python setup.py --quiet build_ext --inplace --force
	@touch $@

man: setup ## the man pages, made from the commands, into build/man: `man -M build/man incfs`
	@$(BIN)/python tools/manpages.py build/man/man1
	@ls build/man/man1 | wc -l

lint: setup ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

sweep: ## take away dead mounts that killed tests left
	@tools/sweep-mounts.sh

test: setup system-test lint sweep ## lint, then every test (PYTEST_ARGS=... narrows them)
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

sanitize: setup ## the C data plane and the threads on /dev/fuse, with ThreadSanitizer and AddressSanitizer
	INCFS_TEST_PROFILE=long $(BIN)/python -m pytest -o timeout=300 tests/native $(PYTEST_ARGS)

damage-long: setup ## damage 20,000 tiny pools and judge what is made of each
	INCFS_DAMAGE_CASES=20000 $(BIN)/python -m pytest -rP tests/damage/test_damage.py -k 'regions or lying'

teeth: setup system-test ## break a copy of the product in each way known; every time a named test must turn red (TEETH=part-of-a-name)
	$(BIN)/python -m tests.teeth $(TEETH)

teeth-some: setup system-test ## the same for a dozen of them, another dozen for each commit; about a minute
	$(BIN)/python -m tests.teeth --some

# Two machines at once; what they are started from is made first, once.
VM_PYTEST := INCFS_REQUIRE_VM=1 $(BIN)/python -m pytest -rP -o timeout=2400 --numprocesses 2 --dist loadfile --no-loadscope-reorder
test-vm: setup system-vm ## Debian 12 and 13 in virtual machines: their kernels, real boots, power cuts; under 20 minutes
	$(BIN)/python -m tests.vm.image
	$(VM_PYTEST) tests/vm $(PYTEST_ARGS)

test-vm-some: setup system-vm ## the same for one kernel, two boots and one cut
	$(BIN)/python -m tests.vm.image bookworm-6.12
	INCFS_VM_PLATFORMS=bookworm-6.12 $(VM_PYTEST) -m short tests/vm $(PYTEST_ARGS)

SOAK_MINUTES ?= 10
soak: setup system-test sweep ## a day's work in SOAK_MINUTES=10: memory, descriptors, threads and space must not grow
	INCFS_SOAK_MINUTES=$(SOAK_MINUTES) $(BIN)/python -m pytest -rP tests/system/test_soak.py $(PYTEST_ARGS)

crash-long: setup ## cut the power in more than 300,000 ways, let every operation of the host fail, try 1,000,000 schedules of the C code, and 5,000 stories with hot threads between
	INCFS_TEST_PROFILE=long INCFS_CRASH_SEEDS=30 INCFS_SCHEDULES=1000000 $(BIN)/python -m pytest -o timeout=7200 \
	    tests/crash tests/native/test_schedules.py tests/model/test_gremlin.py tests/model/test_gremlin_sweep.py $(PYTEST_ARGS)

# Thousands of rounds, and many writers for twice CROWD_S seconds: hours; `make kill-long KILL_ROUNDS=500 CROWD_S=300` for fewer.
KILL_ROUNDS ?= 3000
CROWD_S ?= 5000
kill-long: setup system-bench sweep ## end the daemon, or cut the power under it, thousands of times; judge what is left
	INCFS_KILL_ROUNDS=$(KILL_ROUNDS) INCFS_CUT_STATES=$(KILL_ROUNDS) INCFS_CUT_CLONES=$$(($(KILL_ROUNDS) / 50 + 1)) \
	    INCFS_CROWD_S=$(CROWD_S) INCFS_REQUIRE_POSTGRES=1 \
	    $(BIN)/python -m pytest -rP -o timeout=7200 tests/system/test_kill.py tests/system/test_crowd.py tests/system/test_postgres.py \
	    tests/system/test_failpoints.py \
	    tests/system/test_signals.py tests/system/test_out_of_memory.py tests/system/test_restart.py \
	    tests/system/test_below_process.py tests/system/test_power_loss.py \
	    tests/system/test_disk_faults.py $(PYTEST_ARGS)

# An hour: tmpfs, ext4, XFS and btrfs of 300 MiB, images with the pool and apart, writes that fail and that wait.
FULL_ROUNDS ?= 500
full-long: setup system-test sweep ## fill a pool FULL_ROUNDS=500 times while another program takes and returns the rest of its disk
	INCFS_FULL_ROUNDS=$(FULL_ROUNDS) $(BIN)/python -m pytest -rP -o timeout=20000 tests/system/test_full_pool.py tests/system/test_full_loop.py $(PYTEST_ARGS)

demo: setup system-demo ## the main job on this machine's own files: examples/quickstart.sh
	examples/quickstart.sh

bench: setup system-bench ## the benchmark against peers, hours (BENCH_ARGS=... narrows it)
	$(BIN)/python -m bench $(BENCH_ARGS)
	$(BIN)/python bench/snapshots.py
	$(BIN)/python bench/replication.py

bench-quick: setup system-bench ## its most telling part, under five minutes
	$(BIN)/python -m bench --quick $(BENCH_ARGS)

wheel: setup ## build a wheel into dist/ and try it in a fresh environment
	@rm -rf dist build
	@$(PIP) wheel --no-deps --wheel-dir dist .
	@$(PYTHON) -m venv build/wheel-check
	@build/wheel-check/bin/python -m pip -qq --disable-pip-version-check install dist/incfs-*.whl
	@cd build && wheel-check/bin/python -c 'import incfs.fusext as f; assert f.install(), "the extension is not in place"'
	@ls dist

clean: ## remove everything that was built
	rm -rf $(VENV) build dist incfs.egg-info incfs/*.so .coverage .coverage.* htmlcov .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
