# Every word a person can say: 'make help'. Needs Python 3.11 to 3.13, make and git; the rest comes from the lock.
SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)
PORT ?= 5000

.PHONY: help setup repro check test test-ci test-all sizes lint bench ui images lock clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  retort --help    the steps, one by one (source .venv/bin/activate first)"

setup: ## build .venv from the lock, if it is missing or stale
	@infra/setup.sh

repro: setup ## the whole pipeline on the embedded data: dvc repro, then the report
	@dvc repro; status=$$?; retort report; exit $$status

lint: setup ## style, types and the import rule
	@ruff check . && ruff format --check --quiet . && mypy && lint-imports --no-cache | tail -n 5

check: lint ## lint, then the small tests: before every commit
	@pytest -q -m "not medium and not large and not slow"

test: lint ## lint, then small and medium tests
	@pytest -q -m "not large and not slow"

test-ci: lint ## what continuous integration runs: all that guards what the README says
	@pytest -q -m "not slow or claim"

test-all: lint ## lint, then every test
	@pytest -q

sizes: setup ## measure every test that is not slow: tests/durations.json, by which they are sorted
	@pytest -q -m "not slow" --store-durations

bench: setup ## measure what the README claims; a table, and outputs/bench/results.json
	@python -m tests.benchmarks

ui: setup ## the MLflow UI of this folder's runs, at http://127.0.0.1:5000 (PORT=...)
	@retort ui --port $(PORT)

images: ## the container images of infra/images (needs Docker)
	@infra/images/build.sh

lock: ## resolve requirements.lock anew from pyproject.toml, for every Python supported (needs uv)
	@infra/lock.sh

clean: setup ## remove what can be remade
	@retort clean
