# make sample   a grid of guided and unguided images from the bundled network
# make test     the quick tests;  make check  everything that CI runs;  make fix  formatting
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# one worker more than there are cores, because some tests wait for processes; at most four, for their memory
WORKERS := $(shell $(PYTHON) -c "import os; print(min(4, 1 + os.cpu_count()))")
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(WORKERS) --dist loadfile \
	--no-loadscope-reorder

# make playground  a page in the browser on which guidance can be tried
# make bench    speed beside the public code: make bench ADM=../guided-diffusion SAG=../Self-Attention-Guidance
# make docs     the documentation site in build/site
.PHONY: install sample playground test test-all check lint types bench docs fix clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

sample: install
	$(BIN)/sagl sample --compare --num_samples 16 --batch_size 16 --output samples

playground: install
	$(BIN)/sagl playground

test: install
	$(PYTEST) -m "not slow"

test-all: install
	$(PYTEST)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

check: lint types test-all

bench: install
	$(BIN)/python benchmarks/speed.py $(if $(ADM),--reference-adm $(ADM)) $(if $(SAG),--reference-sag $(SAG)) \
		--report benchmarks/reports/here.md

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Show it: $(BIN)/python -m http.server --directory build/site"

fix: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) samples
