# Two commands matter: `make demo` and `make test`. Both install what they need into .venv and can be run again.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
LIBGOMP := sh -c 'test "$$(id -u)" = 0 && { apt-get install -y libgomp1 || { apt-get update && apt-get install -y libgomp1; }; }'
export OMP_NUM_THREADS ?= 1

.PHONY: demo test static tests faults verify verify-cheetah bench-ope bench-bandits bench-logs bench-nightly bench-serve bench-loop bench-rl clean

demo: .venv/.demo
	$(BIN)/propel demo

test: static tests

static: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

tests: .venv/.dev
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# what `make test` does a few times, many times over: some minutes
faults: .venv/.dev
	PROPEL_KILLS=60 $(BIN)/python -m pytest tests/faults tests/nightly/test_ingest.py tests/bandits/test_sampling.py

# what only many runs can show: two hours. Runs that are done are kept in .verify, and not made again
VERIFIED = reinforce grpo rec opmd asymre bapo mdpo offpolicymdpo trpo sac dac ailboost bc td3 td3bc iql awac cql prdc
verify: .venv/.dev
	$(BIN)/python -m tests.verify.closed_loop --runs 200
	$(BIN)/python -m benchmarks.loop --decisions 1000000 --folder .verify/loop
	for method in $(VERIFIED); do $(BIN)/propel rl verify $$method || exit 1; done
	$(MAKE) verify-cheetah

# the part of it that needs MuJoCo: scores on a data set of our own making. Half an hour
verify-cheetah: .venv/.dev
	$(PIP) '.[mujoco]'
	for method in controlppo mdpo; do $(BIN)/propel rl verify $$method || exit 1; done
	test -f $(CHEETAH) || $(BIN)/propel rl data make halfcheetah --quality medium-replay --seed 1 --to $(CHEETAH)
	$(BIN)/propel rl compare --methods BC,TD3BC,IQL,PRDC --task $(CHEETAH) --env HalfCheetah-v5 --references=-286,5159 \
		--steps 50000 --width 128 --batch 128 --seeds 3 --to .verify/cheetah
CHEETAH = .verify/cheetah-medium-replay.parquet

bench-ope: .venv/.demo
	$(BIN)/python -m benchmarks.ope --rounds 1000000 --actions 10
	$(BIN)/python -m benchmarks.ope --rounds 10000000 --actions 10

bench-bandits: .venv/.demo
	$(BIN)/python -m benchmarks.bandits

bench-logs: .venv/.demo
	$(BIN)/python -m benchmarks.logs

bench-nightly: .venv/.demo
	$(BIN)/python -m benchmarks.nightly

bench-serve: .venv/.dev
	$(BIN)/python -m benchmarks.serve

bench-loop: .venv/.dev
	$(BIN)/python -m benchmarks.loop
	$(BIN)/python -m benchmarks.reload

bench-rl: .venv/.dev
	$(BIN)/python -m benchmarks.rl_token
	$(BIN)/python -m benchmarks.rl_control --search

clean:
	rm -rf .venv propel-demo .mypy_cache .ruff_cache .hypothesis .import_linter_cache

.venv/.demo: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Propel needs Python 3.11 or newer; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing what the demo needs into .venv; this takes a minute or two."
	$(PIP) '.[serve,jobs]'
	@$(BIN)/python -c 'import ctypes; ctypes.CDLL("libgomp.so.1")' 2>/dev/null || $(LIBGOMP) >/dev/null 2>&1 || \
		{ echo "LightGBM needs the system library libgomp.so.1. Run: sudo apt-get install libgomp1, then make again."; exit 1; }
	@touch $@

.venv/.dev: .venv/.demo
	@echo "Installing what the checks need into .venv, torch among it; this takes some minutes."
	$(PIP) '.[dev]'
	@touch $@
