# Two commands do everything: `make demo` and `make test`. Each installs what it needs into .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo full-size test test-flower test-flower-all check quick lint install format bench aot test-gpu bench-gpu \
        test-matrix test-wheel clean

demo: $(STAMP)  ## the main job: a federated run on a small MoE, ends with a table and runs/demo/report.html
	$(BIN)/flex demo --output runs/demo

# One process a core, each with one thread: with more, all would wait for the same cores. A process takes up to 3 GB.
SIDE_BY_SIDE := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

test: $(STAMP) lint  ## everything CI runs: plain, then once more with Triton's interpreter
	$(SIDE_BY_SIDE)
	TRITON_INTERPRET=1 $(SIDE_BY_SIDE) -m "not slow" $(KERNEL_TESTS)

check: test

test-flower: $(STAMP)  ## three engines, real processes on loopback: the same bits, through accidents
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/flower/engines.py

test-flower-all: $(STAMP)  ## every accident and every refusal that docs/deploy.md names, and its commands; tens of minutes
	$(BIN)/python -m pytest -q -p no:cacheprovider $(wildcard tests/flower/*.py)

quick: $(STAMP) lint  ## a newcomer's check: something of every room (tests/quick.txt)
	$(BIN)/python -m pytest -q @tests/quick.txt

# The operations' own tests: the same files serve the plain run, the interpreter and a device.
KERNEL_TESTS := $(addprefix tests/flex_kernels/test_,experts.py weights.py route.py graft_logits.py grafted_route.py \
                combine.py score.py routing_plan.py) $(wildcard tests/flex_kernels/test_kernels_*.py)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/* csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# With SHAPE=T,H,E,K,I (or names of benchmarks/shapes.py), PEER=eager or my_module:MyExperts (commas between several) or
# DTYPE=bfloat16, the layer's rows of what was picked are printed, and RESULTS.md stays as it is.
PICKED = $(if $(SHAPE),--shape "$(SHAPE)") $(if $(PEER),--peer "$(PEER)") $(if $(DTYPE),--dtype "$(DTYPE)")
bench: $(STAMP)  ## the layer on this CPU beside transformers' own; writes benchmarks/RESULTS.md
	$(BIN)/python -m pytest --benchmark-only -q \
		$(if $(strip $(PICKED)),benchmarks/bench_experts.py --benchmark-quiet $(PICKED),benchmarks)

aot: $(STAMP)  ## compile every Triton kernel for sm_80, sm_90, sm_100 and gfx942, no GPU needed; prints the table
	$(BIN)/python -m benchmarks.aot

# A hung kernel ends its process after a minute, with the stack of the test; a lost device ends it at once (conftest).
LAYERS  ?= 24
EXPERTS ?= 60
full-size: $(STAMP)  ## a federated round at Qwen1.5-MoE-A2.7B's sizes with 4-bit experts; MODEL=folder for a real one
	$(BIN)/python -m tools.full_size --layers $(LAYERS) --experts $(EXPERTS) $(if $(MODEL),--model $(MODEL)) \
		--output $(if $(OUTPUT),$(OUTPUT),runs/full-size-$(LAYERS)x$(EXPERTS))

test-gpu:  ## on a machine with a device whose torch, triton, transformers and peft are installed; no network
	-FLEX_CUDA=auto $(PYTHON) setup.py -q build_ext --inplace
	FLEX_TILES= $(PYTHON) -m pytest -q -p no:cacheprovider --maxfail=12 \
		-o faulthandler_timeout=60 -o faulthandler_exit_on_timeout=true \
		$(shell $(PYTHON) -c "import xdist" 2>/dev/null && echo "-n 6 --dist loadfile") $(KERNEL_TESTS) \
		$(addprefix tests/flex_kernels/test_,layer.py transformers_plug.py subsets.py neurons.py refit.py)

# Calls of at most 10 minutes add up to one file: MINUTES is for one of them, PART names parts (see benchmarks/gpu), and
# OUTPUT is a folder for the results where those of the tree do not survive.
# FLEX_TILES= : the tables' tiles, not what somebody's FLEX_TUNE=1 has remembered.
MINUTES ?= 8
EXPANDABLE := PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True  # where the driver can do it: memory is split less
bench-gpu:  ## on such a machine: everything measured beside every peer; writes benchmarks/results and RESULTS.md
	-FLEX_CUDA=auto $(PYTHON) setup.py -q build_ext --inplace
	FLEX_TILES= $(shell $(EXPANDABLE) $(PYTHON) -c "import torch; torch.empty(1 << 30, device='cuda')" 2>/dev/null \
		&& echo $(EXPANDABLE)) $(PYTHON) -m benchmarks.gpu --minutes $(MINUTES) \
		$(if $(PART),--part $(PART)) $(if $(OUTPUT),--output $(OUTPUT)) || test $$? -eq 3

test-matrix: $(STAMP)  ## both ends of the supported range; installs each into a virtual environment of its own
	bash tests/matrix.sh

test-wheel:  ## the suite against an installed wheel, in an empty virtual environment
	bash tests/wheel.sh

clean:
	rm -rf build *.egg-info flex_kernels/*.so $(STAMP)
