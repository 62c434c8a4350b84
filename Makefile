# make demo: four methods, two seeds each, trained and attacked; a table and two plots (4 minutes)
# make test: everything CI runs (ruff, then pytest)
# make prove: the tests that are too long for every change (marked `long`)
# make fuzz: 32,000 drawn sequences of events beside the oracle, with fresh seeds (35 minutes)
# make mutants: some forty faults put into a copy of the code, one at a time; a test must notice each
# make newest: `make test` with the newest versions of everything that the index has
# make oldest: the optimizer's own tests with the oldest torch that is promised (5 GB of disk)
# make survive: kill trainings at random moments, 30 times a method; the bits must be the same
.PHONY: demo test prove mutants fuzz newest oldest survive lint bench clean

PYTHON ?= python3
BIN := .venv/bin
READY = $(BIN:bin=ready)
VERSIONS := -c constraints.txt
OLDEST := 2.9.1
CORE := $(addprefix tests/test_,$(addsuffix .py,checkpoints invariants optimizer reference \
	sequences state wrappers))

demo: $(READY)
	$(BIN)/python -m bench compare --demo

# a thread for each of the two processes: more only wait for each other
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

prove: $(READY) .venv/peers
	$(BIN)/python -m pytest -m long

mutants: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants

fuzz: $(READY)
	$(BIN)/python -m tests.sequences --examples 20000
	$(BIN)/python -m tests.sequences --examples 10000 --backend numba
	$(BIN)/python -m tests.sequences --examples 2000 --backend triton --events 4

survive: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.survive --kills 30

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

# venvs of their own, which stay until `make clean`
newest:
	$(MAKE) test BIN=.venv-newest/bin VERSIONS=
oldest: .venv-oldest/ready
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist loadfile $(CORE)

# the interpreter of that torch's Triton fails with numpy 2.4
.venv-oldest/ready: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip "setuptools>=77"
	.venv-oldest/bin/python -m pip install --quiet --no-compile --no-build-isolation \
		torch==$(OLDEST) "numpy<2.4" -e ".[cpu]" pytest pytest-benchmark pytest-xdist hypothesis
	touch $@

# The first call keeps its times, in runs/benchmarks; later ones fail where something takes more
# than twice as long at its fastest (another program's load adds to the median, less to the
# minimum). After `rm -r runs/benchmarks` the next call is the first.
bench: $(READY)
	$(BIN)/python -m pytest tests/test_speed.py --benchmark-enable --benchmark-only \
		--benchmark-storage=file://runs/benchmarks --benchmark-columns=median,iqr,min,rounds \
		$(if $(wildcard runs/benchmarks/*/0001_*.json),--benchmark-compare='*/0001' \
		--benchmark-compare-fail=min:100%,--benchmark-autosave)

clean:
	rm -rf .venv .venv-newest .venv-oldest runs

# torch and torchvision come from one index in one call: their builds must match
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77"
	$(BIN)/python -m pip install --quiet --no-compile --no-build-isolation $(VERSIONS) \
		-e ".[cpu,bench,test,recipes]"
	touch $@

# other people's attacks, for the tests that compare ours with them
.venv/peers: .venv/ready
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[peers]"
	touch $@
