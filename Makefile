# Everything is made in .venv; nothing is taken from outside but Python 3.11 or newer.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q --numprocesses logical --maxprocesses 8 --dist worksteal --durations 5
unexport PYTHONDONTWRITEBYTECODE  # tests start hundreds of processes: none of them is to compile weft anew

.PHONY: install demo test check unit parallel golden system docs benchmarks clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	./scripts/system-packages.sh
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install  ## The journey: text in, a model trained over two processes, proved, saved, answering.
	PATH="$(CURDIR)/$(BIN):$$PATH" ./scripts/demo.sh

test: check  ## All tests, the quickest first; several folders at a time, where the end of one would leave a core idle.
	$(PYTEST) tests/unit tests/golden tests/docs/test_docs.py
	$(PYTEST) tests/parallel
	./scripts/browser.sh
	./scripts/aiperf.sh
	./scripts/perf_analyzer.sh
	./scripts/slurm.sh
	$(PYTEST) tests/docs/test_commands.py tests/system

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: install
	$(PYTEST) tests/unit

golden: install
	$(PYTEST) tests/golden

parallel: install
	$(PYTEST) tests/parallel

system: install
	./scripts/browser.sh
	./scripts/aiperf.sh
	./scripts/perf_analyzer.sh
	./scripts/slurm.sh
	$(PYTEST) tests/system

docs: install
	$(PYTEST) tests/docs

benchmarks: install  ## Hours; results go to benchmarks/results.
	for file in startup tokenization train_speed cutting context memory savings moe schedules plan_search plan_memory checkpoint_stall \
			served_products served_steps serve_engine serve_start serve_triton serve_overload serve_tenants serve_fuzz serve_protocols profile_overhead gpu; do \
		$(BIN)/python benchmarks/$$file.py || exit 1; \
	done

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
