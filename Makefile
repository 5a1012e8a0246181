# `make demo` shows the product, `make test` tests it. The rest is for working on the code.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# one more than there are cores: the one with the whole stack mostly waits
TEST_PROCESSES ?= $(shell $(PYTHON) -c "import os; print(min(4, (os.cpu_count() or 1) + 1))")

.DEFAULT_GOAL := help
.PHONY: help setup demo up down unit test check fuzz lint format docs lock audit bench bench-sync bench-follow bench-api clean

help:  ## the list of targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(VENV)/.ready  ## install everything that is needed into .venv

# with uv if it is installed, otherwise with pip; pinned by requirements.lock, compiled so that Dagster starts fast
$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) scripts/setup.py $(VENV)
	@touch $@

demo: setup  ## the whole product once, on real data: about four minutes, no key, nothing left behind
	@$(BIN)/embedd demo

up: setup  ## the stack, until Ctrl-C
	@$(BIN)/embedd up

down: setup  ## stop what `make up` started
	@$(BIN)/embedd down

unit: setup  ## tests that need no server
	@$(BIN)/pytest -q -m unit

# the tests of one file stay together, because they share servers; each process has its own PostgreSQL and Qdrant
test: setup  ## every test
	@$(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

check: lint test  ## what CI runs

fuzz: setup  ## property tests with other examples than make test has, then ten thousand requests by the OpenAPI, recorded
	@TEST_EXAMPLES=other $(BIN)/pytest -q tests/core tests/connectors/postgresql/cdc/test_pgoutput.py tests/contracts/test_store_filters.py \
		tests/engine/test_model.py tests/engine/cdc/test_model.py tests/stack/qdrant/test_server.py tests/api/test_fuzz.py
	@TEST_EXAMPLES=other FUZZ_EXAMPLES=200 FUZZ_RESULT=benchmarks/results/schemathesis.md $(BIN)/pytest -q --timeout 3600 tests/api/test_schemathesis.py

lint: setup  ## style, types, import contracts, words
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python scripts/check_words.py

format: setup  ## format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: setup  ## the pages of docs/reference/, from the code
	@$(BIN)/python -m scripts.reference

lock:  ## pin what pyproject.toml asks for, for development and for the image (needs uv)
	@uv pip compile --quiet pyproject.toml --extra dev --universal --python-version 3.11 \
		--no-emit-index-url --no-header --generate-hashes --output-file requirements.lock
	@uv pip compile --quiet pyproject.toml --extra redis --extra tokenizer --universal --python-version 3.11 \
		--constraint requirements.lock --no-emit-index-url --no-header --generate-hashes --output-file deploy/requirements.lock

audit:  ## known vulnerabilities of what requirements.lock pins (needs uv and PyPI itself: mirrors do not list them)
	@uv tool run pip-audit --strict --require-hashes --disable-pip --requirement requirements.lock

bench: setup  ## the engine against the barest script and against peers; recorded in benchmarks/results/ (long)
	@$(BIN)/python -m benchmarks.engine --peers

bench-sync: setup  ## the cost of a sync, up to a million rows; recorded
	@$(BIN)/python -m benchmarks.sync

bench-follow: setup  ## from a commit in the source until the row is found, and changes per second; recorded
	@$(BIN)/python -m benchmarks.follow

bench-api: setup  ## what the API adds to a query, and how it does with ten thousand tables (six minutes; needs wrk)
	@$(BIN)/python -m benchmarks.api

clean:  ## remove what setup and up made, except .env
	@test ! -x $(BIN)/embedd || $(BIN)/embedd down --remove-state
	rm -rf $(VENV) .dagster
