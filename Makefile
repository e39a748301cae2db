# scalekd-cache. Each command is `scalekd <command>`; NAME=value becomes --name value. `make help` lists all.
SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory
.SUFFIXES:
comma := ,
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
COMMANDS = cache-teacher distill evaluate probe finetune export report verify repair inspect plan prove publish pull fetch costs import-upstream
BENCHMARKS = bench-codec bench-scale study
DEVELOPMENT = install study-figures bench bench-gpu bench-shuffle test test-ci test-all lint format docs clean

# ---- variables as options: one rule (pipelines/make_options.py), checked before an environment exists
typed = $(foreach name,$(filter-out MAKE%,$(.VARIABLES)),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
quoted = '$(subst ','\'',$(1))'
ask = $(PYTHON) -m pipelines.make_options $(1) $(foreach name,$(typed),$(call quoted,$(name)=$($(name))))
given = $(foreach name,$(filter $(1),$(typed)),$($(name)))
on = $(filter-out 0 false no,$(call given,$(1)))
define options_of
OPTIONS_$(1) := $$(shell $$(call ask,options $$(MAKELEVEL) $(1)))
$$(if $$(filter error:,$$(firstword $$(OPTIONS_$(1)))),$$(error $$(OPTIONS_$(1))))
endef
$(foreach goal,$(filter $(COMMANDS) $(BENCHMARKS) $(DEVELOPMENT),$(MAKECMDGOALS)),$(eval $(call options_of,$(goal))))

# ---- environment ----------------------------------------------------------------------------------------------------
ifeq ($(VENV),none)
PY := $(PYTHON)
else
PY := $(VENV)/bin/python
BASE := $(VENV)/.installed
TESTS := $(VENV)/.installed-test
export PATH := $(abspath $(VENV))/bin:$(PATH)
endif
# Two makes in one folder install one after the other, if the file system supports locks.
waiting = $(if $(shell command -v flock),{ exec 9>"$(VENV).$$(uname -n).lock" && flock 9; } 2>/dev/null || \
  echo "warning: no file lock next to $(VENV): do not run two installations at the same time" >&2;)

install: $(BASE) ## Create .venv and install the package

$(VENV)/bin/python:
	@$(waiting) test -x $@ || { echo "creating $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }

$(VENV)/.installed: setup.cfg pyproject.toml | $(VENV)/bin/python
	@$(waiting) test $@ -nt setup.cfg || { echo "installing into $(VENV) (several GB with PyTorch, takes minutes)"; \
	  $(PY) -m pip install --quiet --disable-pip-version-check -e . && touch $@; }

$(VENV)/.installed-test: $(VENV)/.installed
	@$(waiting) test $@ -nt setup.cfg || { echo "installing the test dependencies"; \
	  $(PY) -m pip install --quiet --disable-pip-version-check -e .[test] && touch $@; }

# ---- commands -------------------------------------------------------------------------------------------------------
.PHONY: help $(COMMANDS) $(BENCHMARKS) $(DEVELOPMENT)

help: ## Show this help
	@$(PYTHON) -m pipelines.make_options help
	@echo "Other targets:"
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1  - \2/p' $(MAKEFILE_LIST)
	@echo; echo 'Variables of make: PYTHON=python3, VENV=dir (none: the active environment), SET="option=value ...", PLUGIN=module'

$(filter-out distill,$(COMMANDS)): $(BASE)
	@$(PY) -m pipelines $@ $(OPTIONS_$@)

# A missing cache is created first, if the options of stage 2 are valid; with FOLLOW=1 another job is writing it. A dry run ends where the cache is missing.
# Only command-line values count, as for options. With JSON=1, stage 1 prints to stderr, unless a dry run ends there.
PLACE = $(shell $(call ask,place))
made = ls $(patsubst %,%/manifest.json,$(subst $(comma), ,$(PLACE))) >/dev/null 2>&1
make_cache = $(MAKE) cache-teacher SET= PIXELS_FROM= $(if $(call on,DRY_RUN),,$(if $(call on,JSON),JSON= >&2))
missing = if $(made); then $(call ask,unused); else $(PY) -m pipelines $@ $(OPTIONS_$@) --check-values && $(make_cache); fi || exit $$?; $(if $(call on,DRY_RUN),$(made) || exit 0;)
distill: $(BASE)
	@$(if $(call given,CACHE),$(call ask,unused);,$(if $(call on,FOLLOW RESUME EXTEND),,$(missing))) $(PY) -m pipelines $@ $(OPTIONS_$@) $(if $(call given,CACHE),,$(if $(call given,TEACHERS),--cache $(PLACE)))

# ---- benchmarks -----------------------------------------------------------------------------------------------------
BENCHES = store.throughput training.startup store.growth codec.decode training.heads training.stage1 training.stage1_pipeline store.loader store.pipelines training.step training.break_even
GPU_BENCHES = training.heads training.stage1 training.step codec.decode

bench: $(BASE) ## Run the benchmarks of docs/BENCHMARKS.md (20 minutes on 2 cores); BENCHES="store.throughput ..."
	@for bench in $(BENCHES); do OMP_NUM_THREADS=1 $(PY) -m benchmarks.$$bench || exit 1; done
bench-gpu: $(BASE) ## Run the benchmarks that need a GPU
	@for bench in $(GPU_BENCHES); do $(PY) -m benchmarks.$$bench --device cuda || exit 1; done
bench-shuffle: $(BASE) ## Measure how well samples are shuffled and how much each process reads
	@$(PY) -m benchmarks.store.shuffle_quality
bench-codec: $(BASE) ## Benchmark codecs on real features: CACHE=dir of a float32 cache, or FEATURES=maps.npy IDS=images.npy
	@$(PY) -m benchmarks.codec.fidelity $(OPTIONS_$@)
bench-scale: $(BASE) ## Simulate 1 to 1,024 processes; CHECK=1 first measures the demo on 1 and 2 processes
	@$(PY) -m benchmarks.scaling $(OPTIONS_$@)
study: $(BASE) ## Compare cached with live training: SUITE=cpu|cpu-long|full DATA= HOURS=1.5 PLAN=1; resumable
	@$(PY) -m benchmarks.study $(OPTIONS_$@)
study-figures: $(BASE) ## Create the figures and tables of the study from its JSON lines
	@$(PY) -m benchmarks.study.figures

# ---- development ----------------------------------------------------------------------------------------------------
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS)

test: $(TESTS) ## Run the tests (under 15 minutes on 2 cores); JOBS=n sets the number of processes
	@$(PYTEST) -m "not slow and not gpu" $(ARGS)
test-ci: $(TESTS) ## Run the slow tests of continuous integration: kills, damage, replaced files
	@$(PYTEST) -m "ci_slow and not gpu" $(ARGS)
test-all: $(TESTS) ## Run all tests, including slow tests
	@$(PYTEST) $(ARGS)
lint: $(TESTS) ## Check formatting, lint and types
	@$(PY) -m ruff format --check . && $(PY) -m ruff check . && $(PY) -m mypy
format: $(TESTS) ## Format the code
	@$(PY) -m ruff format . && $(PY) -m ruff check --fix .
docs: $(TESTS) ## Build the documentation as one site, into build/docs
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet && echo "build/docs/index.html (search: $(PY) -m http.server -d build/docs)"
clean: ## Remove the environment and tool caches (keeps caches/, runs/ and teachers/)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build
.DEFAULT:
	@$(PYTHON) -m pipelines.make_options target $@ $(COMMANDS) $(BENCHMARKS) $(shell sed -nE 's/^([a-z-]+):.*\#\#.*/\1/p' $(firstword $(MAKEFILE_LIST)))
