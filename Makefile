# m3serve: `make serve` and `make test` do all their own set-up in .venv.
PYTHON ?= python3
PORT ?= 8000
# Extra arguments for pip, e.g. an index with CPU-only torch wheels.
PIP_ARGS ?=
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help serve monitor test faults fuzz compat lint format generate tools bench aot clean

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -e '.[test]'
	@touch $@

serve: $(INSTALLED) ## serve the demo checkpoint on CPU at 127.0.0.1:8000 (PORT=...)
	$(BIN)/m3serve serve --port $(PORT)

monitor: $(INSTALLED) ## run Prometheus on the service of this machine (fetches it where PATH has none)
	$(BIN)/python -m deploy.tools fetch prometheus promtool
	$(BIN)/m3serve monitor

# What needs no cluster runs on all processors; longest files first.
test: $(INSTALLED) tools ## run all tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests/model tests/golden tests/kernels tests/unit
	$(BIN)/python -m pytest tests/service tests/deploy tests/faults tests/fuzz

faults: $(INSTALLED) ## kill and stop every kind of process under load; prints a table (about 15 min)
	$(BIN)/python -m tests.faults

fuzz: $(INSTALLED) ## hostile input for about SECONDS (600), guided by coverage where atheris is installed
	$(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),600)

compat: $(INSTALLED) ## run other people's clients against the service on CPU (installs several GB, once)
	PIP_ARGS='$(PIP_ARGS)' $(BIN)/python -m tests.compat

tools: $(INSTALLED) ## fetch helm, prometheus and hadolint into .tools where PATH has none
	$(BIN)/python -m deploy.tools fetch

lint: $(INSTALLED) ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## format the code in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

aot: $(INSTALLED) ## compile every GPU kernel for sm_90, gfx942 and gfx950 and check what it takes; needs no GPU
	env -u TRITON_INTERPRET $(BIN)/python -W ignore -m tests.kernels.aot --all

generate: $(INSTALLED) ## write the dashboards, the rules and the table of metrics anew
	$(BIN)/python -m deploy.generate

bench: $(INSTALLED) ## offline speed of the demo checkpoint (MODEL=DIR for another)
	$(BIN)/m3serve bench offline $(if $(MODEL),--model $(MODEL))

clean: ## remove the environment and caches
	rm -rf .venv .venv-compat build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
