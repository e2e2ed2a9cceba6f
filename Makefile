# Everything a newcomer or CI needs. The environment lives in .venv: made on first use, reused until pyproject.toml changes.
SHELL := /bin/bash
PYTHON := .venv/bin/python
# pytest workers; tests that start real processes stay together on one of them (tests/conftest.py).
TEST_WORKERS ?= 2
# Passed on: make up ARGS="--detach --port 8001", make test ARGS="-k planner", make soak ARGS="..."
ARGS ?=
# Paths that pyright and ruff look at come from pyproject.toml.
.DEFAULT_GOAL := help

.PHONY: help env lock model cluster-tools images chart up down test lint format bench bench-transfer soak proto clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

env: ## make or refresh .venv (a second run takes milliseconds)
	@scripts/setup_env.sh

lock: ## move scripts/constraints.txt, the versions that .venv has, to the newest
	@scripts/setup_env.sh lock

model: env ## download SmolLM2-135M-Instruct (93 MB) into the model cache, once
	@$(PYTHON) -m baton pull smollm2

cluster-tools: env ## build what tests against Kubernetes run (about 20 minutes, once), or say why they will be skipped
	@$(PYTHON) -m tests.cluster.build

images: ## build the container images; ARGS="--into containerd" (or kind, or a file) loads them
	@python3 images/build.py $(ARGS)

chart: env ## write the generated parts of helm/baton again: values, schema, CRDs, rules, dashboards
	@$(PYTHON) scripts/write_chart.py

up: env ## start gateway, one prefill and one decode worker with SmolLM2; Ctrl-C stops all of it
	@$(PYTHON) -m baton up $(ARGS)

down: env ## stop what `make up` started
	@$(PYTHON) -m baton down $(ARGS)

test: env model cluster-tools ## every test but the soak
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PYTHON) -m pytest -n $(TEST_WORKERS) -m "not soak" $(ARGS)

lint: env ## formatting, lint, types, layers
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	.venv/bin/lint-imports
	.venv/bin/pyright --pythonpath $(PYTHON)

format: env ## let ruff put the source in order
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: env model ## measure; figures with commands belong into docs/log.md
	@$(PYTHON) -m bench $(ARGS)

bench-transfer: env model ## measure how KV moves, and what safety takes of TTFT: a table and transfer.svg, in about 8 minutes
	@$(PYTHON) -m bench.transfer --plot transfer.svg $(ARGS)

soak: env model cluster-tools ## hundreds of kills; prints run/total
	@$(PYTHON) -m pytest -m soak -s --timeout 0 $(ARGS)

proto: env ## generate kvtransfer/protocol/baton_pb2*.py again after a change of baton.proto
	$(PYTHON) -m kvtransfer.protocol.generate

clean: ## remove .venv and caches of the tools (not the models)
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
