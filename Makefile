# make demo   pictures to scores on this machine     make test   the tests     make lint   ruff and mypy
# make test-browser   the page of megastar report in a headless chromium
# make clean  remove what make made      make test-slurm   the launchers on a SLURM cluster of this machine (root, Debian)
#
# PYTHON chooses the interpreter (3.10 to 3.12). TORCH_INDEX chooses where torch comes from, for example the index of
# CPU builds that PyTorch's site names: without it pip takes its default build, with CUDA libraries of some GB.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH_FROM := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
GPU := command -v nvidia-smi >/dev/null
# DeepSpeed's own operators are compiled when first used, not now.
export DS_BUILD_OPS := 0

.PHONY: demo test test-slurm test-browser lint clean install

install: $(STAMP)

$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else f"Python {v[0]}.{v[1]} is not supported: make PYTHON=python3.11, or any from 3.10 to 3.12")'
	$(PYTHON) -m venv $(VENV)
	@$(GPU) || [ -n '$(TORCH_INDEX)' ] || echo 'no NVIDIA GPU here: if pip now fetches CUDA libraries, TORCH_INDEX can name an index of CPU builds'
	$(BIN)/pip install $(TORCH_FROM) $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install -c constraints.txt -e '.[eval,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/megastar demo

test: $(STAMP)
	$(BIN)/pytest -m 'not gpu and not slow and not slurm and not browser'

test-slurm: $(STAMP)
	$(BIN)/pytest -m slurm tests/slurm

test-browser: $(STAMP)
	$(BIN)/pytest -m browser tests/integration

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
