# make demo   runs the main job        make test   lint, types, docs, tests
# Both set themselves up in $(VENV). VENV= (empty) runs in the current interpreter and installs nothing.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
OUT ?= demo_out
JOBS ?= 2
comma := ,

ABSOLUTE_PYTHON := $(if $(findstring /,$(PYTHON)),$(abspath $(PYTHON)),$(PYTHON))
PY := $(if $(VENV),$(abspath $(VENV))/bin/python,$(ABSOLUTE_PYTHON))
INSTALLED := $(VENV)/.installed-$(TORCH)
READY := $(if $(VENV),$(INSTALLED),tree)
# The pins are CPU builds that are at hand; another release takes what the index serves.
PINNED := $(filter 2.13.0,$(TORCH))
CONSTRAINTS := $(if $(PINNED),-c constraints.txt,)
EXTRAS := $(if $(PINNED),demo$(comma)test$(comma)docs$(comma)dev$(comma)mlir,demo$(comma)test)

export NO_MKDOCS_2_WARNING = 1
# The package as an installation maps it, for what does not look into an editable install.
TREE := build/tree
ifeq ($(strip $(VENV)),)
export PYTHONPATH := $(CURDIR)/$(TREE)$(if $(PYTHONPATH),:$(PYTHONPATH),)
endif

.PHONY: demo test lint types docs unit interpreted test-torch check-device tree clean
.DEFAULT_GOAL := test

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q "torch==$(TORCH)" $(CONSTRAINTS) "setuptools>=77.0.3" wheel
	$(PY) -m pip install -q --no-build-isolation $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	rm -f $(VENV)/.installed-*
	touch $@

# Links to the package's modules, and in it links to the two sibling folders.
tree:
	@mkdir -p $(TREE)/parallax_compile
	@rm -f $(TREE)/parallax_compile/*
	@for entry in parallax_compile/*.py parallax_compile/py.typed lowering templates; do \
		ln -sfn "$(CURDIR)/$$entry" $(TREE)/parallax_compile/; done

# Compiled kernels are kept, so that a second demo starts at once. Tests have caches of their own (tests/conftest.py).
demo: export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/.cache/inductor
demo: export TRITON_CACHE_DIR ?= $(CURDIR)/.cache/triton
demo: $(READY)
	$(PY) examples/demo.py --out $(OUT)

test: lint types docs unit interpreted

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m codespell_lib parallax_compile lowering templates tests benchmarks examples docs README.md CHANGELOG.md

types: $(READY) tree
	cd $(TREE) && $(PY) -m mypy --config-file $(CURDIR)/pyproject.toml -p parallax_compile

docs: $(READY)
	$(PY) -m mkdocs build --strict --quiet --site-dir build/site

# Neighbours in a file share what they compile once, and no worker idles at the end.
PYTEST := -m pytest -n $(JOBS) --dist worksteal

# PYTHONSAFEPATH: the package is imported as it is installed, not from the current folder.
unit: $(READY)
	PYTHONSAFEPATH=1 $(PY) $(PYTEST) tests --ignore=tests/interpreted

# Triton reads TRITON_INTERPRET when it is imported, so the interpreter has a process of its own.
interpreted: $(READY)
	PYTHONSAFEPATH=1 TRITON_INTERPRET=1 $(PY) $(PYTEST) tests/interpreted

# make test-torch TORCH=2.11.0: the suite on another release, in an environment of its own.
test-torch:
	$(MAKE) VENV=.venv-torch-$(TORCH) TORCH=$(TORCH) unit interpreted

# On a machine with a GPU, e.g. make check-device VENV= ARGS="--json results.json"
check-device: $(READY)
	$(PY) benchmarks/check_device.py $(ARGS)

clean:
	rm -rf build dist .cache .venv .venv-torch-* demo_out *.egg-info
