# Words of this project: setup, demo, test, check, sim, chaos, flood, bench, attacks, badinputs, fuzz, schema, lock, proto. Each does the set-up it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
PICTURES := .venv/.pictures
FUZZER := .venv/.fuzzer

.PHONY: setup demo test check sim chaos flood bench attacks badinputs fuzz schema lock proto clean
.DELETE_ON_ERROR:

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	@echo 'Setting up .venv, once; it takes some minutes.'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[test,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/barnraise demo $(ARGS)

# The longest files first, then the quick ones; whole swarms (tests/e2e) last and one at a time: each wants both cores.
# Not among them: ARGS="tests -m long", and what make chaos does.
test: $(STAMP)
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	$(BIN)/python -m pytest -m "not long" -n 3 --dist loadfile --no-loadscope-reorder tests/sim tests/edges tests/core
	$(BIN)/python -m pytest -m "not long" tests/e2e
endif

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m protocol.generate --check

sim: $(STAMP)
	$(BIN)/python -m tests.sim $(if $(SEEDS),--seeds $(SEEDS)) $(if $(FIRST),--first $(FIRST)) $(ARGS)

chaos: $(STAMP)
	$(BIN)/python -m tests.chaos $(if $(PART),--part $(PART)) $(ARGS)

flood: $(STAMP)
	$(BIN)/python -m tests.flood $(ARGS)

$(PICTURES): $(STAMP)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

bench: $(PICTURES)
	$(BIN)/python -m tests.bench $(if $(PART),--part $(PART)) $(ARGS)

attacks: $(STAMP)
	$(BIN)/python -m tests.attacks $(ARGS)

badinputs: $(STAMP)
	$(BIN)/python -m tests.badinputs $(ARGS)

$(FUZZER): $(STAMP)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	@touch $@

fuzz: $(FUZZER)
	$(BIN)/python -m tests.fuzz $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS)

schema: $(FUZZER)
	$(BIN)/python -m tests.schema $(ARGS)

lock: $(STAMP)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[lock]'
	$(BIN)/python deploy/lock.py

proto: $(STAMP)
	$(BIN)/python -m protocol.generate

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .schemathesis .fuzz dist
