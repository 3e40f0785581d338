# Two commands do everything: `make demo` and `make test`. Each installs what it needs into .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test check lint install format bench aot test-gpu test-matrix clean

demo: $(STAMP)  ## the main job: a federated run on a small MoE, ends with a table and runs/demo/report.html
	$(BIN)/flex demo --output runs/demo

test: $(STAMP) lint  ## everything CI runs: plain, then once more with Triton's interpreter
	$(BIN)/python -m pytest -q
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m "not slow" $(INTERPRETED)

check: test

INTERPRETED := tests/test_experts.py tests/test_route.py tests/test_combine.py tests/test_score.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf build *.egg-info flex_kernels/*.so
