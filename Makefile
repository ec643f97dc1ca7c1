# EfficientNet from training to production. `make` lists the targets.

PYTHON ?= python3
PORT ?= 3000
# The hardware extra follows from whether a GPU answers; ONNX Runtime's two packages exclude each other.
HARDWARE := $(if $(shell nvidia-smi --list-gpus 2>/dev/null),gpu,cpu)
OTHER_ORT := $(if $(filter gpu,$(HARDWARE)),onnxruntime,onnxruntime-gpu)
EXTRAS := train,search,export,serve,bulk,traces,dev,rtx,weights,$(HARDWARE)
INSTALLED := .venv/.installed-$(HARDWARE)
NATIVE := efficientnet/runtimes/native
ENGINE := $(NATIVE)/_engine.so
RUN := .venv/bin/python
LITE0 := artifacts/lite0/default/manifest.json
# The two photographs that come with scikit-learn.
SAMPLES = $(wildcard .venv/lib/python3*/site-packages/sklearn/datasets/images/*.jpg)

# A failing pip is not hidden by what reads its output.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

export BENTOML_DO_NOT_TRACK := True

.PHONY: help setup wheel demo imagenet test check train export perf latency-ci serve clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

setup: $(INSTALLED) $(ENGINE)  ## make .venv with everything installed; nothing when it is up to date

$(INSTALLED): pyproject.toml constraints.txt hatch_build.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $$($(PYTHON) --version) is too old, 3.11 or newer is needed:" \
	       "make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip uninstall --quiet --yes $(OTHER_ORT)
	@echo "installing into .venv, 6 GB: one to five minutes"
	$(RUN) -m pip install --constraint constraints.txt --editable ".[$(EXTRAS)]" \
	  | { grep --line-buffered -E '^(Collecting|Installing|ERROR)' || true; } | cut -c 1-70
	@rm -f .venv/.installed-*
	@touch $@

# Without a compiler the native engine is left out, and its export says so.
$(ENGINE): $(wildcard $(NATIVE)/*.cpp $(NATIVE)/*.h) $(NATIVE)/build.py | $(INSTALLED)
	-$(RUN) $(NATIVE)/build.py

wheel: setup  ## make dist/*.whl, with the native engine in it for machines without a compiler
	$(RUN) -m pip wheel --quiet --no-deps --wheel-dir dist .

demo: setup  ## the whole road on handwritten digits: train, export, measure, report, serve
	$(RUN) training/run.py v2-b0
	$(RUN) export/ort.py
	$(RUN) perf/accuracy.py
	$(RUN) perf/latency.py
	$(RUN) perf/report.py
	$(RUN) serving/demo.py --artifact artifacts/v2-b0/onnxruntime-fp32 --report reports/report.html
	@echo "photographs    make imagenet IMAGE=photo.jpg, with real ImageNet weights, in a minute"

imagenet: $(LITE0)  ## classify photographs (IMAGE=photo.jpg) with real ImageNet weights
	$(RUN) serving/classify.py $(or $(IMAGE),$(SAMPLES)) --artifact artifacts/lite0/default
	@echo "serve it: $(RUN) serving/run.py --artifact artifacts/lite0/default"

$(LITE0): $(INSTALLED)
	$(RUN) training/import_weights.py lite0 --from package:lite0 --output runs/imagenet
	$(RUN) export/quick.py --checkpoint runs/imagenet/latest/checkpoint
	@touch $@

test: check  ## format, lint, types, import contracts, tests
	$(RUN) -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations 10

check: setup  ## format, lint, types, import contracts
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/codespell
	.venv/bin/pyright
	.venv/bin/lint-imports --no-cache

train: setup  ## train EfficientNetV2-S on the embedded digits
	$(RUN) training/run.py v2-s

export: setup  ## export the newest complete run to all that this machine can make, in one table
	$(RUN) export/all.py

perf: setup  ## measure the newest run and its artifacts, write the report
	$(RUN) perf/accuracy.py
	$(RUN) perf/latency.py
	$(RUN) perf/report.py

latency-ci: setup  ## is this commit slower or less accurate than BASE=REV? measured in turns
	$(RUN) perf/regression.py --base $(or $(BASE),$(error which revision is compared with? make latency-ci BASE=main))

serve: setup  ## serve the exported model on http://localhost:$(PORT)
	$(RUN) serving/run.py --port $(PORT)

clean:  ## remove what was produced, but not .venv and the published reports
	rm -rf runs artifacts reports/*.jsonl reports/*.npy reports/report.* reports/network.* reports/preprocessing.json reports/loader.json reports/layers.json reports/parity.json reports/exports.json reports/stock.json reports/fusion.json reports/side-by-side.json reports/*.png reports/demo reports/latency-ci reports/paper reports/choice.* reports/agreement.json reports/denormals.json
