# make demo   runs the main job        make test   lint, types, docs, tests
# Both set themselves up in $(VENV). VENV= (empty) runs in the current interpreter and installs nothing.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
OUT ?= demo_out

PY := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
STAMP := $(if $(VENV),$(VENV)/.installed,)
# The pins are CPU builds that are at hand; another release takes what the index serves.
CONSTRAINTS := $(if $(filter 2.13.0,$(TORCH)),-c constraints.txt,)

export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/.cache/inductor
export TRITON_CACHE_DIR ?= $(CURDIR)/.cache/triton

.PHONY: demo test lint types docs unit interpreted test-torch clean
.DEFAULT_GOAL := test

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q "torch==$(TORCH)" $(CONSTRAINTS) "setuptools>=68" wheel
	$(VENV)/bin/python -m pip install -q --no-build-isolation $(CONSTRAINTS) -e ".[demo,test,docs,dev]"
	touch $@

demo: $(STAMP)
	$(PY) examples/demo.py --out $(OUT)

test: lint types docs unit interpreted

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m codespell_lib parallax_compile lowering templates tests benchmarks examples docs README.md CHANGELOG.md

# The type checker wants the package as it is installed: links to the two sibling folders inside of it.
types: $(STAMP)
	rm -rf build/types && mkdir -p build/types && cp -rs "$(CURDIR)/parallax_compile" build/types/
	ln -s "$(CURDIR)/lowering" "$(CURDIR)/templates" build/types/parallax_compile/
	cd build/types && $(abspath $(PY)) -m mypy --config-file ../../pyproject.toml -p parallax_compile

docs: $(STAMP)
	$(PY) -m mkdocs build --strict --quiet --site-dir build/site

unit: $(STAMP)
	$(PY) -m pytest tests --ignore=tests/interpreted -n 2

# Triton reads TRITON_INTERPRET when it is imported, so the interpreter has a process of its own.
interpreted: $(STAMP)
	TRITON_INTERPRET=1 $(PY) -m pytest tests/interpreted -n 2

# make test-torch TORCH=2.11.0: the suite on another release, in an environment of its own.
test-torch:
	$(MAKE) VENV=.venv-torch-$(TORCH) TORCH=$(TORCH) unit interpreted

clean:
	rm -rf build dist .cache .venv .venv-torch-* demo_out *.egg-info
