# scalekd-cache. `make help` lists targets and variables.
SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory
.SUFFIXES:

# ---- variables of the user ----------------------------------------------------------------------------------------
PYTHON ?= python3
VENV ?= .venv
NPROC ?= 1
LAUNCHER ?= $(if $(HOSTFILE),deepspeed,torchrun)
NNODES ?= 1
MASTER_PORT ?= 29500
DATA_GIVEN := $(DATA)
DATA ?= demo
RECIPE_OF_DATA = $(if $(filter demo,$(DATA)),demo,traditional)
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)
THREADS ?= $(shell echo $$(( $(CORES) / $(NPROC) > 0 ? $(CORES) / $(NPROC) : 1 )))
# With few cores, loading runs in the main process between the steps: a worker would only take a core from training.
WORKERS ?= $(shell [ $(CORES) -gt 4 ] && echo $(THREADS) || echo 0)
# Parallel test processes, of one thread each.
JOBS ?= 2
CACHE_GIVEN := $(CACHE)
ifeq ($(CACHE),)
CACHE := $(if $(filter-out demo,$(DATA)),$(shell $(PYTHON) scalekd_cache/config/places.py '$(subst ','\'',$(DATA))'),caches/demo)
endif

# Make itself ignores a mistyped variable and would train with the default instead.
VARIABLES = ALL ARGS BENCHES CACHE CHECK CKPT CLASSES CODEC DATA DEEP DRY_RUN EPOCHS FEATURES FOLLOW FORM FORMAT GPU \
  GPU_BENCHES HEAD HEADS HOSTFILE HOURS IDS INDEX INIT JOB JOBS JSON KEY LAUNCHER LOCAL_ADDR MASTER_ADDR MASTER_PORT \
  NAME NNODES NODE_RANK NPROC OMP_NUM_THREADS OUT PIXELS PIXELS_FROM PLAN PLUGIN PRETRAINED PYTHON RECIPE RESTARTS RESULTS RUN \
  RUNS S4_QUERY SET SHELL STORE STUDENT STUDENTS TARGET TARGETS TEACHER TEACHER_WEIGHTS THREADS VENV VIEW VIEWS WORKERS ZERO
COMMA := ,
typed = $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
unknown := $(firstword $(filter-out $(VARIABLES) MAKE%,$(typed)))
unknown_name = $(shell $(PYTHON) -c 'import sys; from scalekd_cache.errors import unknown_name; what, where, got, *known = sys.argv[1:]; \
  print(unknown_name(what, got, known, where, 1))' $(1))
ifneq ($(unknown),)
$(error error: $(call unknown_name,variable "make help; other options: SET=$(COMMA) environment variables: before make" $(unknown) $(VARIABLES)))
endif

# ---- environment --------------------------------------------------------------------------------------------------
ifeq ($(VENV),none)
PY := $(PYTHON)
BASE :=
TESTS :=
else
PY := $(VENV)/bin/python
BASE := $(VENV)/.installed
TESTS := $(VENV)/.installed-test
export PATH := $(abspath $(VENV))/bin:$(PATH)
endif
export OMP_NUM_THREADS ?= $(THREADS)
export PYTHONUNBUFFERED = 1

# A single process is started directly, several by torchrun or by the deepspeed launcher (docs/SCALE.md).
several = $(HOSTFILE)$(filter-out 1,$(NPROC) $(NNODES))
LAUNCH = $(if $(several),$(if $(filter deepspeed,$(LAUNCHER)),$(DEEPSPEED),$(TORCHRUN)),$(PY) -m)
# Without the --, torchrun would read our --run as an abbreviation of its --run-path.
TORCHRUN = $(PY) -m torch.distributed.run $(TORCHRUN_NODES) --nproc-per-node $(NPROC) -m --
elastic = $(findstring :,$(NNODES))
# A single machine uses the loopback address, however its host name resolves.
TORCHRUN_NODES = $(if $(filter 1,$(NNODES)),--standalone --local-addr 127.0.0.1,$(if $(elastic),$(ELASTIC_NODES),$(FIXED_NODES)))
FIXED_NODES = --nnodes $(NNODES) --node-rank $(call needed,NODE_RANK) --master-addr $(call needed,MASTER_ADDR) \
  --master-port $(MASTER_PORT)
# Elastic: nodes may join and leave. The node MASTER_ADDR (NODE_RANK=0) hosts the rendezvous.
ELASTIC_NODES = --nnodes $(NNODES) --max-restarts $(or $(RESTARTS),10) --rdzv-backend c10d --rdzv-id $(or $(JOB),scalekd) \
  --rdzv-endpoint $(call needed,MASTER_ADDR):$(MASTER_PORT) --rdzv-conf is_host=$(if $(filter 0,$(NODE_RANK)),1,0) \
  $(call option,LOCAL_ADDR,local-addr)
DEEPSPEED = deepspeed $(if $(HOSTFILE),$(DEEPSPEED_NODES),--num_gpus $(NPROC)) --module
DEEPSPEED_NODES = --hostfile "$(HOSTFILE)" --master_port $(MASTER_PORT) $(call option,MASTER_ADDR,master_addr) \
  $(if $(NODE_RANK),--no_ssh --node_rank $(NODE_RANK))
needed = $(or $($(1)),$(error error: give $(1)=: with NNODES=$(NNODES) every node needs NODE_RANK= and MASTER_ADDR=))
# torchrun: a new key-value store for every start of the processes (a shared one keeps the values of the previous
# start); the signals of schedulers are forwarded to the processes, which have five minutes to save.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE ?= 1
export PET_SIGNALS_TO_HANDLE ?= SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT ?= 300
# Two makes on one node and one folder run one after the other, if the file system supports locks. Descriptor 9 holds
# the lock until the recipe's line ends.
waiting = $(if $(shell command -v flock),{ mkdir -p "$$(dirname "$(1)")" && exec 9>"$(1).$$(uname -n).lock" && flock 9; } 2>/dev/null || \
  echo "warning: no file lock next to $(1): do not run two commands that write there at the same time" >&2;)

option = $(if $(strip $($(1))),--$(2) "$($(1))")
SET_OPTIONS = $(foreach pair,$(SET),--$(pair))

.PHONY: bench bench-gpu bench-codec bench-scale bench-shuffle study study-figures help install cache-teacher distill evaluate export import-upstream verify prove plan fetch costs test test-ci test-all lint format clean repair inspect

help: ## Show this help
	@echo "Targets:"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1 \2/' | while read -r name text; do printf '  make %-16s %s\n' "$$name" "$$text"; done
	@echo
	@echo "Variables of cache-teacher:"
	@echo "  DATA=demo|cifar10|imagenette|/path   images in train/ and val/ (folders, tars or parquet); default demo"
	@echo "  TEACHER=name                         timm model; default: the recipe's (demo_swin, or Swin-L)"
	@echo "  TEACHER_WEIGHTS=file.safetensors     its weights; default: timm's pretrained ones (PRETRAINED=0: random)"
	@echo "  RECIPE=name                          views and training (pipelines/recipes); default: demo or traditional"
	@echo "  VIEWS=n  CODEC=int8|transform|...    views per image, feature codec (docs/CODECS.md)"
	@echo "  CODEC=auto TARGET=ac-cosine:0.999    the smallest codec that meets the target; also bytes:20000, kl:0.01"
	@echo "  STORE=webdataset|zarr  PIXELS=baked|replayed"
	@echo "  PIXELS_FROM=dir                      use the pixels of that cache and store only new features and logits"
	@echo "  CACHE=dir                            default caches/<data>"
	@echo "  STUDENT=name                         also run one real training step of this student before stage 1 starts"
	@echo "Variables of distill:"
	@echo "  STUDENT=name                         timm model (required); TARGETS=cached|live|none; EPOCHS=n"
	@echo "  CACHE=dir|URL  RUN=dir               default caches/<data> (created if missing), runs/<student>"
	@echo "  INIT=dir                             initialize from an exported or imported student (and its heads)"
	@echo "  FOLLOW=1                             train while the cache is being written; wait for missing views"
	@echo "  PIXELS_FROM=dir                      the cache with the shared pixels (default: as recorded, relative to CACHE)"
	@echo "  HEADS=cap|lite                       projectors as published, or cheaper ones (docs/METHOD.md)"
	@echo "  ZERO=0..3                            DeepSpeed ZeRO stage; LAUNCHER=torchrun|deepspeed"
	@echo "Variables of both:"
	@echo "  NPROC=n                              processes on this node; THREADS=n and WORKERS=n (data loading) per process"
	@echo "  NNODES=n NODE_RANK=i MASTER_ADDR=host  several nodes with torchrun, run on each; NNODES=1:16: elastic"
	@echo "  HOSTFILE=file                        several nodes with deepspeed over ssh (with NODE_RANK=i: without ssh, run on each)"
	@echo "  DRY_RUN=1                            run all checks, print what would be done and stop"
	@echo "  PLUGIN=module                        Python module that registers custom models (docs/GUIDES.md)"
	@echo '  SET="dotted.key=value ..."           any other option; python -m pipelines.distill --help lists them'
	@echo "Environment: PYTHON=python3 sets the interpreter, VENV=dir the environment (VENV=none: the active one)"

# ---- environment --------------------------------------------------------------------------------------------------
install: $(BASE) ## Create .venv and install the package

$(VENV)/bin/python:
	@$(call waiting,$(VENV)) $(SHELL) -c 'test -x $@ || { echo "creating $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }'

$(VENV)/.installed: setup.cfg pyproject.toml | $(VENV)/bin/python
	@$(call waiting,$(VENV)) $(SHELL) -c 'test $@ -nt setup.cfg || { echo "installing into $(VENV) (several GB with PyTorch, takes minutes)"; \
	  $(PY) -m pip install --quiet --disable-pip-version-check -e . && touch $@; }'

$(VENV)/.installed-test: $(VENV)/.installed
	@$(call waiting,$(VENV)) $(SHELL) -c 'test $@ -nt setup.cfg || { echo "installing the test dependencies"; \
	  $(PY) -m pip install --quiet --disable-pip-version-check -e .[test] && touch $@; }'

# ---- commands -----------------------------------------------------------------------------------------------------
cache-teacher: $(BASE) ## Stage 1: run the teacher once, store views, features and logits
	@$(if $(DRY_RUN),,$(call waiting,$(CACHE))) $(LAUNCH) pipelines.cache_teacher $(STAGE1) $(if $(DRY_RUN),--dry-run)

plan: $(BASE) ## Forecast the cost of a cache and its students: DATA= TEACHER= VIEWS= CODEC= STUDENTS=8 EPOCHS=300 GPU=h100 JSON=1
	@$(PY) -m pipelines.plan $(STAGE1) $(call option,STUDENTS,students) $(call option,EPOCHS,epochs) \
	  $(call option,GPU,gpu) $(if $(JSON),--json true)

STAGE1 = $(call option,PLUGIN,plugin) $(STAGE1_OF) --cache.path "$(CACHE)" --workers $(WORKERS) $(call option,PIXELS_FROM,cache.pixels_from) \
	  $(call option,TEACHER,teacher.name) $(call option,TEACHER_WEIGHTS,teacher.weights) \
	  $(if $(PRETRAINED),--teacher.pretrained $(if $(filter 0 false no,$(PRETRAINED)),false,true)) \
	  $(call option,VIEWS,cache.num_views) $(call option,CODEC,cache.codec) $(call option,TARGET,cache.codec_target) \
	  $(call option,STORE,cache.backend) $(call option,PIXELS,views.pixels) $(call option,STUDENT,student) $(CACHE_SET)

cache-teacher plan: CACHE_SET = $(SET_OPTIONS)
# A cache with shared pixels takes data set and recipe from the cache that holds them, unless they are given.
STAGE1_OF = $(if $(PIXELS_FROM),$(call option,RECIPE,recipe) $(call option,DATA_GIVEN,data.source),\
  --recipe "$(or $(RECIPE),$(RECIPE_OF_DATA))" --data.source "$(DATA)")

# With FOLLOW=1 another job is writing the cache.
FOLLOWS = $(filter-out 0 false no,$(FOLLOW))

distill: $(BASE) ## Stage 2: train STUDENT from a cache (created first if missing)
	@test -n "$(STUDENT)" || { echo 'error: give STUDENT=, for example make distill STUDENT=resnet50' >&2; exit 2; }
ifeq ($(CACHE_GIVEN),)
	@test -n "$(FOLLOWS)" -o -f "$(CACHE)/manifest.json" || $(MAKE) cache-teacher SET= PIXELS_FROM=
endif
	@$(if $(DRY_RUN),test -f "$(CACHE)/manifest.json" || exit 0; )$(LAUNCH) pipelines.distill $(call option,PLUGIN,plugin) $(if $(DRY_RUN),--dry-run) --student.name "$(STUDENT)" --cache "$(CACHE)" --train.workers $(WORKERS) \
	  $(call option,RECIPE,recipe) $(call option,INIT,init) $(call option,EPOCHS,train.epochs) $(call option,RUN,run) \
	  $(call option,ZERO,train.zero) $(call option,TARGETS,train.targets) $(call option,HEADS,scalekd.projector) \
	  $(if $(FOLLOWS),--follow true) $(call option,PIXELS_FROM,pixels_from) \
	  $(call option,TEACHER_WEIGHTS,teacher_weights) $(if $(filter-out demo,$(DATA)),--data "$(DATA)") $(SET_OPTIONS)

evaluate: $(BASE) ## Measure the accuracy of a run's student, or of an exported or imported one: RUN=dir [DATA= JSON=1]
	@$(PY) -m pipelines.evaluate --run "$(RUN)" $(if $(JSON),--json) $(if $(filter-out demo,$(DATA)),--data "$(DATA)")

export: $(BASE) ## Export a run's student: RUN=dir [OUT=place FORMAT=timm|safetensors|onnx|torch-export|torchvision|mmpretrain]
	@$(PY) -m pipelines.export $(call option,PLUGIN,plugin) --run "$(RUN)" $(call option,OUT,out) $(call option,FORMAT,format)

import-upstream: $(BASE) ## Convert a published ScaleKD checkpoint to timm: CKPT=file.pth OUT=dir [STUDENT=name CLASSES=n]
	@test -n "$(CKPT)" -a -n "$(OUT)" || { echo 'error: give CKPT=file.pth and OUT=dir' >&2; exit 2; }
	@$(PY) -m pipelines.import_upstream --ckpt "$(CKPT)" --out "$(OUT)" $(call option,STUDENT,student) \
	  $(call option,CLASSES,classes) $(call option,S4_QUERY,s4_query)

verify: $(BASE) ## Check a cache: CACHE=dir or URL; DEEP=1 checks all bytes and re-runs the teacher on a sample; JSON=1 for scripts
	@$(PY) -m pipelines.verify $(call option,PLUGIN,plugin) --cache "$(CACHE)" $(if $(DEEP),--deep true) $(if $(JSON),--json true) \
	  $(call option,TEACHER_WEIGHTS,teacher_weights) $(call option,PIXELS_FROM,pixels_from) \
	  $(if $(filter-out demo,$(DATA)),--data "$(DATA)") $(SET_OPTIONS)

repair: $(BASE) ## Rebuild the damaged units of a cache: CACHE=dir [DATA= TEACHER_WEIGHTS= PIXELS_FROM=]
	@$(PY) -m pipelines.repair $(call option,PLUGIN,plugin) --cache "$(CACHE)" --workers $(WORKERS) \
	  $(call option,TEACHER_WEIGHTS,teacher_weights) $(call option,PIXELS_FROM,pixels_from) \
	  $(if $(filter-out demo,$(DATA)),--data "$(DATA)") $(SET_OPTIONS)

inspect: $(BASE) ## Show a cache or a record: CACHE=dir [KEY=key|INDEX=n] [VIEW=v] [OUT=file.jpg] [JSON=1]
	@$(PY) -m pipelines.inspect_cache --cache "$(CACHE)" $(call option,KEY,key) $(call option,INDEX,index) \
	  $(call option,VIEW,view) $(call option,PIXELS_FROM,pixels_from) $(call option,OUT,out) $(if $(JSON),--json true)

prove: $(BASE) ## Re-run the teacher on cached views and compare gradients: CACHE=dir [STUDENT=name INIT=dir VIEWS=256]
	@$(PY) -m pipelines.prove $(call option,PLUGIN,plugin) --cache "$(CACHE)" $(call option,STUDENT,student) $(call option,INIT,init) \
	  $(call option,VIEWS,views) $(call option,RECIPE,recipe) $(call option,TEACHER_WEIGHTS,teacher_weights) \
	  $(call option,PIXELS_FROM,pixels_from) $(if $(JSON),--json) $(if $(filter-out demo,$(DATA)),--data "$(DATA)") $(SET_OPTIONS)

.PHONY: report
report: $(BASE) ## Write a report as one HTML file: CACHE=dir, RUN=dir or RUNS="dir dir" [OUT=file DATA= TEACHER_WEIGHTS= PIXELS_FROM=]
	@$(PY) -m pipelines.report $(call option,PLUGIN,plugin) $(if $(RUN)$(RUNS),,--cache "$(CACHE)") $(call option,RUN,run) $(call option,RUNS,runs) \
	  $(call option,OUT,out) $(call option,TEACHER_WEIGHTS,teacher_weights) $(call option,PIXELS_FROM,pixels_from) \
	  $(if $(filter-out demo,$(DATA)),--data "$(DATA)") $(SET_OPTIONS)

fetch: $(BASE) ## Download pretrained weights to teachers/: TEACHER=name
	@$(PY) -m pipelines.fetch --teacher "$(TEACHER)"

costs: $(BASE) ## FLOPs and parameters of a teacher-student pair: TEACHER=name STUDENT=name; ALL=1: all pairs of the paper
	@$(PY) -m pipelines.costs $(call option,TEACHER,teacher) $(call option,STUDENT,student) $(if $(ALL),--all true)

bench-codec: $(BASE) ## Benchmark codecs on real features: CACHE=dir of a float32 cache, or FEATURES=maps.npy IDS=images.npy; NAME=name
	@$(PY) -m benchmarks.codec.fidelity $(if $(FEATURES),--features "$(FEATURES)" $(call option,IDS,ids),--cache "$(CACHE)") \
	  $(call option,HEAD,head) --name "$(or $(NAME),demo)"

BENCHES = store.throughput training.startup store.growth codec.decode training.heads training.stage1 store.loader training.step training.break_even
GPU_BENCHES = training.heads training.stage1 training.step codec.decode

bench: $(BASE) ## Run the benchmarks of docs/BENCHMARKS.md (20 minutes on 2 cores); BENCHES="store.throughput ..."
	@for bench in $(BENCHES); do OMP_NUM_THREADS=1 $(PY) -m benchmarks.$$bench || exit 1; done

bench-gpu: $(BASE) ## Run the benchmarks that need a GPU
	@for bench in $(GPU_BENCHES); do $(PY) -m benchmarks.$$bench --device cuda || exit 1; done

bench-scale: $(BASE) ## Simulate 1 to 1,024 processes; CHECK=1 first measures the demo on 1 and 2 processes
	@$(PY) -m benchmarks.scaling $(if $(CHECK),--check)

bench-shuffle: $(BASE) ## Measure how well samples are shuffled and how much each process reads
	@$(PY) -m benchmarks.store.shuffle_quality

study: $(BASE) ## Compare cached with live training: FORM=cpu|cpu-long|full DATA= TEACHER_WEIGHTS= HOURS=1.5 PLAN=1 RESULTS=dir; resumable
	@$(PY) -m benchmarks.study $(call option,FORM,form) $(if $(filter-out demo,$(DATA)),--data "$(DATA)") \
	  $(call option,TEACHER_WEIGHTS,teacher-weights) $(call option,TEACHER,teacher) $(call option,HOURS,hours) \
	  $(call option,RESULTS,results) $(if $(PLAN),--plan)

study-figures: $(BASE) ## Make the figures and tables of the study from its JSON lines
	@$(PY) -m benchmarks.study.figures

# ---- development --------------------------------------------------------------------------------------------------
test: $(TESTS) ## Run the tests (under 15 minutes on 2 cores); JOBS=n in parallel
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) -m "not slow and not gpu" $(ARGS)

test-ci: $(TESTS) ## Run the slow tests of continuous integration: kills, damage, replaced files
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) -m "ci_slow and not gpu" $(ARGS)

test-all: $(TESTS) ## Run all tests, slow ones included
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) $(ARGS)

lint: $(TESTS) ## Check formatting, lint and types
	@$(PY) -m ruff format --check . && $(PY) -m ruff check . && $(PY) -m mypy

format: $(TESTS) ## Format the code
	@$(PY) -m ruff format . && $(PY) -m ruff check --fix .

.PHONY: docs
docs: $(TESTS) ## Build the API reference from the docstrings, into build/docs
	@$(PY) -m pdoc --docformat google --output-directory build/docs $(MODULES) && echo "build/docs/index.html"
MODULES = $(subst /,.,$(basename $(filter-out %/__init__.py,$(wildcard scalekd_cache/*.py scalekd_cache/*/*.py scalekd_cache/*/*/*.py))))

targets = $(shell sed -nE 's/^([a-z-]+):.*\#\#.*/\1/p' $(firstword $(MAKEFILE_LIST)))
.DEFAULT:
	@echo 'error: $(call unknown_name,target "make help" $@ $(targets))' >&2; exit 2

clean: ## Remove the environment and tool caches (keeps caches/, runs/ and teachers/)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build
