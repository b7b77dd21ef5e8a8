# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: demo test test-kernels kernels-ci floor newest-torch lint consumers compat compat-ci compat-environments newest internevo tokenizer-versions peer-tests
.DEFAULT_GOAL := demo

$(READY): requirements.lock
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('Python 3.11 or newer is needed, but $(PYTHON) is \
	%s: name another, as in make PYTHON=python3.12' % sys.version.split()[0])"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	touch $@

demo: $(READY)
	$(BIN)/python tests/pages/demo.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The model and training tests on other kernels than this processor's own, one set after the other.
KERNELS := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=AVX2 \
	OMP_NUM_THREADS=1 OMP_NUM_THREADS=3
ON_KERNELS := -m pytest -n 2 --dist worksteal tests/models tests/training

test-kernels: $(READY)
	set -e; for kernels in $(KERNELS); do echo "$$kernels"; env $$kernels $(BIN)/python $(ON_KERNELS); done

# All of the sets that are furthest from a new processor's, at once.
kernels-ci: $(READY)
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 $(BIN)/python $(ON_KERNELS)

# All tests on the lowest versions that pyproject.toml allows, together, on the lowest Python. Where the registry has
# torch of that version for GPUs only, the environment takes 7 GB.
FLOOR := .compat/floor
FLOOR_PYTHON ?= python3.11

$(FLOOR)/.installed: requirements.floor.txt
	rm -rf $(FLOOR)
	$(FLOOR_PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/pip install --quiet --disable-pip-version-check --requirement requirements.floor.txt
	touch $@

floor: $(FLOOR)/.installed
	$(FLOOR)/bin/python -m pip list --format=freeze
	$(FLOOR)/bin/python -m pytest -n 2 --dist worksteal

# All tests on the newest torch that pip finds today, and on the locked versions of all else. Up to 6 GB, as above.
NEWEST_TORCH := .compat/newest-torch

newest-torch:
	rm -rf $(NEWEST_TORCH)
	$(PYTHON) -m venv $(NEWEST_TORCH)
	sed '/^torch==/d' requirements.lock > $(NEWEST_TORCH)/requirements.txt
	$(NEWEST_TORCH)/bin/pip install --quiet --disable-pip-version-check torch -r $(NEWEST_TORCH)/requirements.txt
	$(NEWEST_TORCH)/bin/python -c "import torch; print('torch', torch.__version__)"
	$(NEWEST_TORCH)/bin/python -m pytest -n 2 --dist worksteal

# .compat/<version>/: transformers 4.57.6 to 5.24.0, one folder each, all on this environment's torch.
compat-environments: $(READY)
	$(BIN)/python tests/versions/environments.py

# What every version makes of the model packages and of the converters' folders: tests/versions/compatibility.md.
compat: $(READY)
	PYTHONPATH=. $(BIN)/python tests/versions/compatibility.py

# The oldest and the newest version only, and the tests of the models on the oldest.
compat-ci: $(READY)
	PYTHONPATH=. $(BIN)/python tests/versions/compatibility.py 4.57.6 5.24.0
	PYTHONPATH=.compat/4.57.6 $(BIN)/python -m pytest -n 2 --dist worksteal tests/models tests/gpu

# The column of what the package index has as newest today, unpinned, and of release candidates. Before a release.
newest: $(READY)
	PYTHONPATH=. $(BIN)/python tests/versions/compatibility.py --newest

# The real tokenizers on every version, loaded in every way: tests/versions/tokenizer_versions.md.
tokenizer-versions: $(READY)
	PYTHONPATH=. $(BIN)/python tests/versions/tokenizer_versions.py

# Converted folders in other tools, each in an environment of its own (.compat/consumers/): tests/consumers/consumers.md.
# TOOLS="vllm llama-cpp" tries these alone. Disk and minutes of each are in that page.
consumers: $(READY)
	PYTHONPATH=. $(BIN)/python tests/consumers/consumers.py $(TOOLS)

# InternEvo's own trainer and loader on a CPU, of its last package, in a folder beside the environment.
INTERNEVO := .compat/internevo

$(INTERNEVO)/.installed: tests/internevo/requirements.txt | $(READY)
	rm -rf $(INTERNEVO)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(INTERNEVO) --requirement $<
	rm -rf $(INTERNEVO)/tests
	touch $@

internevo: $(INTERNEVO)/.installed
	PYTHONPATH=.:$(abspath $(INTERNEVO)) $(BIN)/python -m pytest -n 2 --dist worksteal -rP tests/internevo/framework_suite.py

# transformers' own tests of causal models, where there is a checkout: TRANSFORMERS_TESTS=its/tests make peer-tests
peer-tests: $(READY)
	PYTHONPATH=. $(BIN)/python -m pytest -o addopts= -o filterwarnings= --quiet tests/peer/peer_suite.py
