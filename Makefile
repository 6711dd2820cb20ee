# Everything that a contributor or CI runs. Needs Python 3.11+ with pip and venv; nothing else.
#
#   make demo     install into .venv and let the real Gemma 3 270M continue a sentence
#   make test     install what the tests need and run them all
#   make check    linter, formatter and generated pages, without running tests
#   make docs     regenerate the generated pages
#   make test-kauldron  train with the real Kauldron, in an environment of its own (.venv-kauldron, 4 GB)
#   make see      let the small model that ships draw boxes around handwritten digits
#   make digits   train that model again (two hours), evaluate it, draw its pictures
#   make bench    the benchmarks of this machine
#   make quant-table  what each quantization costs the demo model: docs/quantization.md
#   make results-sentiment, results-translation, results-assistant
#                 the trainings of docs/results.md, each from its data to its tables; the last one writes the assistant
#   make native   compile the CPU kernels, if a C++20 compiler is there and their sources changed
#   make wheel    a wheel of this platform with the compiled kernels, in dist/
#   make clean    remove .venv and caches of the checkout

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# The pins reach the isolated build of the package itself, too.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.PHONY: demo see digits quant-table results-sentiment results-translation results-assistant test test-kauldron check docs bench native wheel fuzz clean
.DEFAULT_GOAL := test

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "gemmakit needs Python 3.11 or newer; this is %s: set PYTHON=..." % sys.version.split()[0])'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[demo]'
	@touch $@

# PyTorch first and by its exact version: a test oracle whose CPU build pip finds for that spelling.
$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	@$(BIN)/gemma generate --model demo --max-new-tokens 14 'The history of computing began'

# The extra [torch] alone; `make test` installs it too.
$(VENV)/.torch: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[torch]'
	@touch $@

see: $(VENV)/.torch
	@mkdir -p build
	@$(BIN)/gemma see gemma/_assets/digits/scene.png
	@$(BIN)/gemma see gemma/_assets/digits/scene.png "detect digit" --out build/scene.boxes.png

digits: $(VENV)/.test
	$(BIN)/python scripts/train_digits.py train
	$(BIN)/python scripts/train_digits.py export
	$(BIN)/python scripts/train_digits.py evaluate
	$(BIN)/python scripts/train_digits.py picture

quant-table: $(VENV)/.demo
	$(BIN)/python scripts/quant_table.py

results-sentiment results-translation results-assistant: results-%: $(VENV)/.test
	$(BIN)/python scripts/results/$*.py

test: $(VENV)/.test check
	@$(BIN)/python -m gemma.kernels.build --optional
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --durations 15 --support-json=.pytest_cache/support.json
	$(BIN)/python scripts/support_table.py --check .pytest_cache/support.json

# Kauldron brings TensorFlow and 160 packages that nothing else here needs; it has pins of its own.
KAULDRON_VENV ?= .venv-kauldron
# All of it is pinned, so nothing is left to resolve; `pip check` says whether the pins fit.
KAULDRON_PIP := PIP_CONSTRAINT=$(CURDIR)/constraints-kauldron.txt $(KAULDRON_VENV)/bin/python -m pip \
	--disable-pip-version-check

$(KAULDRON_VENV)/.installed: pyproject.toml constraints-kauldron.txt
	@test -x $(KAULDRON_VENV)/bin/python || $(PYTHON) -m venv $(KAULDRON_VENV)
	$(KAULDRON_PIP) install --quiet --no-deps --requirement constraints-kauldron.txt
	$(KAULDRON_PIP) install --quiet --no-deps --editable .
	$(KAULDRON_PIP) check
	@touch $@

test-kauldron: $(KAULDRON_VENV)/.installed
	OMP_NUM_THREADS=1 $(KAULDRON_VENV)/bin/python -m pytest -m kauldron tests/kauldron

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/gen_docs.py --check
	$(BIN)/python scripts/gen_cli_docs.py --check

docs: $(VENV)/.test
	$(BIN)/python scripts/gen_docs.py
	$(BIN)/python scripts/gen_cli_docs.py
	$(BIN)/python scripts/support_table.py

bench: $(VENV)/.test
	$(BIN)/python benchmarks/bench_load.py
	$(BIN)/python benchmarks/bench_generate.py
	$(BIN)/python benchmarks/bench_torch.py --dtype bfloat16
	$(BIN)/python benchmarks/bench_torch.py --dtype float32

# Needs nothing that has to be installed.
native: | $(BIN)/python
	$(BIN)/python -m gemma.kernels.build

# build/lib would bring files along that the sources no longer have.
wheel: | $(BIN)/python
	rm -rf build/lib build/bdist.*
	GEMMAKIT_REQUIRE_NATIVE=1 $(BIN)/python -m pip --disable-pip-version-check wheel --no-deps --wheel-dir dist .

fuzz: $(VENV)/.test
	$(BIN)/python scripts/fuzz.py all --count 100000

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
