# A fresh clone needs make, and Python 3.11 or newer with its venv module. Everything else goes into .venv.

PYTHON ?= python3

VENV := .venv
RUN  := $(VENV)/bin/python
DONE := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help .venv demo serve triton lint check test oldest gpu-compiler comfy bench docs clean

help:
	@echo 'make demo    export the embedded tiny models, sample with and without forecasts, draw the pictures'
	@echo 'make serve   the images API on loopback with the embedded FLUX, and a page to try it'
	@echo 'make triton  start a real Triton server on loopback with the embedded models'
	@echo 'make check   ruff, mypy and the quick tests: FLUX and DiT, no server, no compiler'
	@echo 'make test    ruff, mypy and all tests'
	@echo 'make oldest  a short suite on the oldest versions that the package asks for, in an environment of its own'
	@echo 'make gpu-compiler  graphs compiled for GPUs that are not there, in an environment of its own of 7 GB'
	@echo 'make comfy   the nodes in the real ComfyUI that COMFYUI_PATH names'
	@echo 'make bench   full, forecast and whole-loop times, beside the plan ceiling'
	@echo 'make docs    the reference of the Python API, from its docstrings, in build/reference/'
	@echo 'make .venv   the environment alone (the others make it when it is missing or old)'
	@echo 'make clean   remove caches and build leftovers; .venv and engines/ stay'
	@echo
	@echo 'PYTHON=python3.12 make .venv   chooses the interpreter'

.venv: $(DONE)

$(DONE): pyproject.toml tools/constraints.txt
	@command -v '$(PYTHON)' >/dev/null || \
		{ echo 'PYTHON is `$(PYTHON)`, which is not on the path, expected Python >= 3.11; set PYTHON=/path/to/python3' >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "PYTHON is $$('$(PYTHON)' --version 2>&1), expected Python >= 3.11; set PYTHON=/path/to/python3" >&2; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo 'the venv module of `$(PYTHON)` is missing, expected venv and ensurepip; install them (on Debian: python3-venv)' >&2; exit 1; }
	@echo 'Installing into $(VENV) (several minutes and about 2 GB the first time) ...'
	@'$(PYTHON)' -m venv $(VENV)
	@$(RUN) -m pip install --quiet --quiet --disable-pip-version-check --progress-bar off -c tools/constraints.txt -e '.[dev]'
	@$(RUN) -m pip install --quiet --quiet --disable-pip-version-check --progress-bar off --no-deps --upgrade \
		--target $(VENV)/triton nvidia-pytriton==0.7.0 numpy==1.26.4 || \
		echo "no Triton server for this platform (Linux x86_64, glibc 2.35): its tests will be skipped" >&2
	@touch $(DONE)

serve: $(DONE)
	@test -d engines/flux-tiny || $(RUN) -m taylorseer_export flux --order 2
	@echo 'the images API; `make triton` starts a real Triton server in its place'
	@$(RUN) -m taylorseer_export serve engines/flux-tiny

triton: $(DONE)
	@$(RUN) tools/triton_server.py

demo: $(DONE)
	@$(RUN) tools/demo.py

WORKERS := -n auto --dist loadgroup --no-loadscope-reorder

lint: $(DONE)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

check: lint
	$(RUN) -m pytest -q $(WORKERS) -m 'not slow'

test: lint
	$(RUN) -m pytest -q $(WORKERS)

OLDEST := .venv-oldest

$(OLDEST)/.installed: pyproject.toml tools/constraints-oldest.txt
	@'$(PYTHON)' -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --progress-bar off \
		-c tools/constraints-oldest.txt -e '.[onnxruntime,export,sample]' filelock hypothesis pytest pytest-xdist
	@touch $@

# Every family traced and split: at one granularity over ONNX Runtime, at another and in the other layout eagerly, beside
# the oracle. Then what one export holds, and AOTInductor's bundles of two models.
oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -q $(WORKERS) tests/test_families.py \
		-k 'parity_with_the_oracle and residual or onnx_runtime_equals'
	$(OLDEST)/bin/python -m pytest -q $(WORKERS) tests/test_split.py tests/test_onnx.py
	$(OLDEST)/bin/python -m pytest -q $(WORKERS) tests/test_runtime.py -k 'inductor and all_full'

GPU_COMPILER := .venv-gpu-compiler

# The usual torch wheel of Linux is the CUDA build; it needs no GPU to compile, but the headers of the CUDA toolkit.
$(GPU_COMPILER)/.installed: pyproject.toml tools/constraints-oldest.txt
	@'$(PYTHON)' -m venv $(GPU_COMPILER)
	@$(GPU_COMPILER)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --progress-bar off \
		-c tools/constraints-oldest.txt -e '.[onnxruntime,export,sample]' filelock hypothesis pytest \
		nvidia-cuda-cccl nvidia-cuda-nvcc nvidia-cuda-runtime
	@touch $@

gpu-compiler: $(GPU_COMPILER)/.installed
	$(GPU_COMPILER)/bin/python -m pytest -q -m gpu_compiler tests/test_compile_for_gpu.py

comfy: $(DONE)
	@test -f "$$COMFYUI_PATH/main.py" || \
		{ echo 'COMFYUI_PATH names no ComfyUI, expected its folder; clone it, install its requirements beside .venv, set the path' >&2; exit 1; }
	$(RUN) -m pytest -q tests/test_comfy.py tests/test_comfy_real.py

bench: $(DONE)
	@$(RUN) tools/bench.py

docs: $(DONE)
	@$(RUN) tools/reference.py

clean:
	rm -rf demo dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find taylorseer_export tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
