# make train: the default task, on all GPUs, or on 2 CPU ranks.   make test: the complete suite.
PYTHON ?= python3
VENV   ?= .venv
PIP    ?= pip
GPUS   := $(filter-out 0,$(shell nvidia-smi --list-gpus 2>/dev/null | wc -l))
RANKS  ?= $(or $(GPUS),2)
ON_CPU := $(if $(GPUS)$(wildcard /dev/kfd)$(DS_ACCELERATOR),,DS_ACCELERATOR=cpu)
FREE   := import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])
PORT   ?= $(or $(MASTER_PORT),$(shell $(PYTHON) -c '$(FREE)'))
CONFIG ?= launch/tasks/byte_lm.toml
ARGS   ?=
# The suite in two processes: half of its time it waits for launchers, timeouts and ranks. A file's
# tests stay together, since they share ranks and clusters.
WORKERS ?= 2

export PATH := $(abspath $(VENV))/bin:$(PATH)
export VIRTUAL_ENV := $(abspath $(VENV))

.PHONY: train test lint format

# At Ctrl-C DeepSpeed's launch.py ends the ranks, which save; the command `deepspeed` would leave at once,
# with a traceback, and waits for them if it does not see the signal.
train: $(VENV)/.installed
	trap '' INT; $(ON_CPU) deepspeed --quiet --num_gpus $(RANKS) --master_port $(PORT) \
		launch/train.py --config $(CONFIG) $(ARGS)

test: $(VENV)/.installed-dev
	python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)
	$(if $(GPUS),python -m pytest -m gpu $(ARGS))

lint: $(VENV)/.installed-dev
	ruff check
	ruff format --check
	pyright --pythonpath $(VENV)/bin/python

format: $(VENV)/.installed-dev
	ruff check --fix
	ruff format

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	$(PIP) install --quiet --constraint constraints.txt --no-deps apollo-torch  # to be compared with
	touch $@
