# make install        set up .venv
# make demo           run the whole pipeline, from images to scores, on this machine
# make test           run the tests
# make test-long      run the longest files of tests, which make test leaves out (about 12 minutes on two cores)
# make test-slurm     test the batch scripts on a local SLURM cluster (requires root and Debian)
# make test-elastic   lose nodes of runs that train, on loopback and on the local SLURM cluster (minutes)
# make test-fuzz      run all hostile and damaged files through the commands (make test runs a part), and random property tests
# make test-trackers  test runs with wandb, trackio and mlflow and their local stores (installed in .venv-trackers)
# make test-browser   test the page of megastar report in a headless chromium
# make test-pythons   run the tests that need no torch on the other supported interpreters of this machine
# make test-nullgpu   test on a device that computes nothing: torch's CUDA build (5 GB, in .venv-nullgpu), no GPU needed
# make lint           run ruff and mypy
# make clean          remove .venv, .venv-nullgpu, .venv-trackers, builds and caches
#
# PYTHON selects the interpreter (3.11 to 3.14). TORCH_INDEX selects the package index for torch, for example PyTorch's index
# of CPU builds; without it pip installs its default build, which includes several GB of CUDA libraries. WORKERS is the number of
# files that make test runs at a time, TESTS what it runs of them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH_FROM := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
WORKERS ?= 2
TESTS ?=
# Their examples are always the same in make test, and random in make test-fuzz.
RANDOM_TESTS := tests/unit/data/test_fuzz.py tests/unit/data/test_exactly_once.py tests/unit/model/test_masks.py
GPU := command -v nvidia-smi >/dev/null
# DeepSpeed's operators are compiled at first use, not during installation.
export DS_BUILD_OPS := 0

.PHONY: demo test test-long test-slurm test-elastic test-fuzz test-trackers test-browser test-pythons test-nullgpu lint clean install

install: $(STAMP)

$(STAMP): setup.py constraints.txt
	@sh tools/check_python.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	@$(GPU) || [ -n '$(TORCH_INDEX)' ] || echo 'no NVIDIA GPU found: to avoid downloading CUDA libraries, set TORCH_INDEX to an index of CPU builds'
	$(BIN)/pip install $(TORCH_FROM) $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install -c constraints.txt -e '.[eval,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/megastar demo

test: $(STAMP)
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS) -m 'not gpu and not nullgpu and not slow and not long and not slurm and not browser and not trackers'

test-long: $(STAMP)
	$(BIN)/pytest -n $(WORKERS) --dist loadfile -m 'long and not slow' tests

test-slurm: $(STAMP)
	$(BIN)/pytest -m slurm tests/slurm

test-elastic: $(STAMP)
	$(BIN)/pytest -s tests/elastic tests/dist/test_elastic.py
	$(BIN)/pytest -s -m slurm tests/slurm/test_elastic.py

test-fuzz: $(STAMP)
	MEGASTAR_FUZZ=all $(BIN)/pytest -n 2 -rP tests/integration/fuzz $(RANDOM_TESTS)

# The trackers' packages in an environment of their own, on top of .venv's: trackio needs another Pillow.
TRACKERS := .venv-trackers

$(TRACKERS)/.installed: $(STAMP)
	$(PYTHON) -m venv $(TRACKERS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$($(TRACKERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	$(TRACKERS)/bin/pip install -e '.[wandb,trackio,mlflow]'
	touch $@

test-trackers: $(TRACKERS)/.installed
	$(TRACKERS)/bin/python -m pytest -m trackers tests/integration/tracking

test-browser: $(STAMP)
	$(BIN)/pytest -m browser tests/integration

# In its own environment: the CUDA build of the oldest supported torch, which is also the one measured on GPUs.
NULLGPU := .venv-nullgpu
NULLGPU_TORCH ?= 2.11.0

$(NULLGPU)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(NULLGPU)
	$(NULLGPU)/bin/pip install torch==$(NULLGPU_TORCH) nvidia-cuda-crt==13.0.*
	{ grep -vE '^(torch|triton)==' constraints.txt; echo torch==$(NULLGPU_TORCH); } > $(NULLGPU)/constraints.txt
	$(NULLGPU)/bin/pip install -c $(NULLGPU)/constraints.txt -e '.[eval,dev]'
	touch $@

# Tests that need no torch, on each other supported interpreter that is installed, each in its own environment.
OTHERS ?= $(shell sh tools/other_pythons.sh $(PYTHON))

test-pythons:
	@[ -n '$(OTHERS)' ] || echo 'no other supported Python found: set OTHERS to some, as OTHERS="python3.13 python3.14"'
	for python in $(OTHERS); do sh tools/test_without_torch.sh "$$python" || exit 1; done

test-nullgpu: $(NULLGPU)/.installed
	$(NULLGPU)/bin/pytest -m nullgpu tests/nullgpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(NULLGPU) $(TRACKERS) .venv-python3* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
