# Thin wrappers over `python -m ch11lib` and pytest; README.md gives the same as plain commands.
# They need make and Python 3.11 or newer, nothing else: what they install goes into .venv.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

# What the kernels of notebooks see; the same as in ch11lib.notebooks, which made the outputs.
NOTEBOOK_ENV := env -u MPLBACKEND -u CH11_SEED -u CH11_CLAIMS_LOG \
	TF_CPP_MIN_LOG_LEVEL=3 TF_ENABLE_ONEDNN_OPTS=0 PYTHONHASHSEED=0 OPENBLAS_NUM_THREADS=1
# A notebook's cells must stay in one worker: loadscope. The addopts are for the unit tests.
NBVAL := -q -o addopts= --nbval --nbval-current-env \
	--nbval-sanitize-with=tests/nbval_sanitize.cfg \
	--nbval-cell-timeout=300 --nbval-kernel-startup-timeout=180 \
	-p no:cacheprovider -n 2 --dist loadscope tests/conftest.py
# Of test-numerics, with other seeds each: TensorFlow's other kernels; no XLA and one thread.
VARIANTS := TF_ENABLE_ONEDNN_OPTS=1+CH11_SEED=1 \
	CH11_XLA=0+TF_NUM_INTRAOP_THREADS=1+TF_NUM_INTEROP_THREADS=1+OMP_NUM_THREADS=1+CH11_SEED=2
NOTEBOOKS := $(shell find notebooks -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*' 2>/dev/null)

.DELETE_ON_ERROR:
.PHONY: help run test test-numerics test-browser lab refresh tables margins assignments docs clean

help:  ## say what there is (this list)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Another Python: make PYTHON=python3.12 run. Some notebooks: make run ARGS=notebooks/01*"

run: $(VENV)/.installed  ## execute the notebooks, write pages to read under build/
	$(PY) -m ch11lib run $(ARGS)

test: $(VENV)/.installed-test  ## all tests: style, types, unit tests, notebooks against their outputs
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -n 2
ifneq ($(NOTEBOOKS),)
	$(NOTEBOOK_ENV) $(PY) -m pytest $(NBVAL) notebooks
endif

test-numerics: $(VENV)/.installed-test  ## the notebooks as other hardware would run them, and other seeds
	@for variant in $(VARIANTS); do \
		echo "$$variant" | tr + ' '; \
		$(NOTEBOOK_ENV) $$(echo "$$variant" | tr + ' ') $(PY) -m pytest $(NBVAL) \
			--nbval-cell-timeout=900 notebooks || exit 1; \
	done

test-browser: $(VENV)/.installed-browser  ## JupyterLab and the pages of make run, in a real browser
	$(PY) -m pytest -o addopts= -ra tests/browser

lab: $(VENV)/.installed-lab  ## open the series in JupyterLab
	$(PY) -m jupyterlab notebooks/00_start_here.ipynb

refresh: $(VENV)/.installed  ## execute the notebooks and store their outputs in them
	$(PY) -m ch11lib refresh $(ARGS)

tables: run  ## execute all, and put times and memory into the tables of README.md and notebook 00
	$(PY) docs/tables.py build/notebooks.csv

# Some five hours on two cores; repeat it after an interruption, what was measured stays.
margins: $(VENV)/.installed  ## check all claims with twenty blocks of seeds, for the page of claims
	$(PY) -m ch11lib run --seeds 0-19 --jobs 2 --out build/seeds notebooks/*.ipynb
	cp build/seeds/claims_by_id.csv ch11lib/margins.csv

assignments: $(VENV)/.installed-course  ## make what is handed out (release) from the sources
	cd notebooks/assignments && for name in $$(ls source); do \
		../../$(PY) -m nbgrader generate_assignment $$name --force --no-db || exit 1; done

docs: $(VENV)/.installed-docs  ## write the reference of the library under build/
	$(PY) docs/reference.py build/html/api

clean:  ## delete all that these commands made: .venv, build/, caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps say what was installed last; a newer pyproject.toml asks for it again.
$(VENV)/.installed: pyproject.toml $(VENV)/pyvenv.cfg
	$(PIP) install -e .
	@touch $@

$(VENV)/.installed-%: pyproject.toml $(VENV)/pyvenv.cfg
	$(PIP) install -e ".[$*]"
	@touch $@

$(VENV)/pyvenv.cfg:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON):" \
		"install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c '$(CHECK)'
	$(PYTHON) -m venv --clear $(VENV)

CHECK := import sys; \
	sys.version_info < (3, 11) and sys.exit("Python 3.11 or newer is needed, $(PYTHON) is " \
	+ sys.version.split()[0] + "; name another: make PYTHON=python3.12"); \
	from importlib.util import find_spec; \
	None in map(find_spec, ("venv", "ensurepip")) and sys.exit("$(PYTHON) cannot make virtual " \
	+ "environments; on Debian and Ubuntu: sudo apt install python3-venv")
