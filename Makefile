# Each target installs what it needs into .venv. `make help` lists them.
PYTHON ?= python3
VENV = .venv
RUN = $(VENV)/bin/python
PIP = $(RUN) -m pip --disable-pip-version-check -qq
CPP = $(wildcard csrc/include/* csrc/cpu/*)
CUDA = $(wildcard csrc/cuda/*)
FORMATTED = $(shell find csrc tests/cuda_on_cpu -name build -prune -o -name '*.h' -print -o -name '*.inc' -print \
	-o -name '*.c*' -type f -print)
HAS_GPU = $(shell nvidia-smi -L 2> /dev/null)

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

demo: $(VENV)/.demo  ## solve a puzzle on the CPU, step by step
	@$(VENV)/bin/diffusion-runtime demo

test: $(VENV)/.dev  ## the suite; on a machine without a GPU, every kernel runs on the CPU
	@$(MAKE) --no-print-directory -j2 -C tests/cuda_on_cpu plain
	@$(RUN) -m pytest $(if $(HAS_GPU),,-m "not gpu" -n $(or $(shell nproc 2> /dev/null),1) -p no:benchmark)

bench: $(VENV)/.dev  ## time every op beside its peers: tables, and a record and plots in bench/out
	@mkdir -p bench/out
	@$(RUN) -m bench --json bench/out/record.json --plot bench/out

pycode: $(VENV)/.dev  ## the tables of the Python model that ships, on held-out modules
	@$(RUN) examples/evaluate_pycode.py

lint: $(VENV)/.dev  ## ruff, mypy, clang-format
	@$(RUN) -m ruff check --quiet .
	@$(RUN) -m ruff format --quiet --check .
	@$(RUN) -m mypy
	@$(VENV)/bin/clang-format --dry-run --Werror $(FORMATTED)

compile-check: $(VENV)/.dev  ## compile kernels for GPUs, and count registers, spills, instructions: C++ too
	@env -u TRITON_INTERPRET $(RUN) tests/compile/compile_triton.py
	@$(RUN) tests/compile/compile_cuda.py
	@$(RUN) tests/compile/count_cpp.py

sanitize:  ## the emulated CUDA tests under the address and thread sanitizers
	@$(MAKE) --no-print-directory -j2 -C tests/cuda_on_cpu address thread

gpu-check:  ## on a machine with a GPU, in the current environment, without a network
	$(PYTHON) -m pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
	$(PYTHON) -m pytest -m gpu -W default
	@mkdir -p bench/results
	$(PYTHON) -m bench --full --device cuda --json bench/results/h200.json
	-$(PYTHON) -m bench publish

clean:  ## everything that was built or installed here
	rm -rf $(VENV) build dist *.egg-info diffusion_runtime/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	$(MAKE) --no-print-directory -C tests/cuda_on_cpu clean

$(VENV)/.python:
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# The demo runs on the CPU: it waits neither for triton nor for nvcc.
$(VENV)/.demo: $(VENV)/.python pyproject.toml setup.py constraints.txt $(CPP)
	@echo "installing what the demo needs"
	@$(PIP) install -c constraints.txt setuptools pybind11 torch numpy safetensors rich
	@DIFFUSION_RUNTIME_CUDA=0 $(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml setup.py constraints.txt tests/transformers_oldest.txt $(CPP) $(CUDA)
	@echo "installing diffusion-runtime with its tests and tools"
	@$(PIP) install -c constraints.txt setuptools pybind11
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	@$(PIP) install --upgrade --target $(VENV)/transformers-oldest --no-deps -r tests/transformers_oldest.txt
	@touch $(VENV)/.demo $@

.PHONY: help demo test bench pycode lint compile-check sanitize gpu-check clean
