# make demo: four methods, two seeds each, trained and attacked; a table and two plots (4 minutes)
# make test: everything CI runs (ruff and mypy, then pytest)
# make prove: the tests that are too long for every change (marked `long`)
# make fuzz: 32,000 drawn sequences of events beside the oracle, with fresh seeds (35 minutes)
# make mutants: some sixty faults put into a copy of the code, one at a time; a test must notice each
# make newest: `make test` with the newest versions of everything that the index has
# make oldest: the optimizer's own tests with the oldest torch that is promised (5 GB of disk)
# make survive: kill trainings at random moments, 30 times a method; the bits must be the same
# make docs: the documentation with the API reference, in .site
.PHONY: demo test prove mutants fuzz newest oldest survive lint bench docs clean

# many tests start a process, and each would compile what it imports anew
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
BIN := .venv/bin
READY = $(BIN:bin=ready)
VERSIONS := -c constraints.txt
OLDEST := 2.9.1
CORE := tests/unit tests/integration/test_checkpoints.py

comma := ,

demo: .venv/demo
	@echo "training 4 methods with 2 seeds and attacking them: 4 minutes on two cores"
	$(BIN)/python -m bench compare --demo

# a thread for each of the two processes: more only wait for each other
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

prove: $(READY) .venv/peers
	$(BIN)/python -m pytest -m long

mutants: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants

fuzz: $(READY)
	$(BIN)/python -m tests.helpers.sequences --examples 20000
	$(BIN)/python -m tests.helpers.sequences --examples 10000 --backend numba
	$(BIN)/python -m tests.helpers.sequences --examples 2000 --backend triton --events 4

survive: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.helpers.survive --kills 30

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
	$(BIN)/python -m pytest tests/unit/test_speed.py --benchmark-enable --benchmark-only \
		--benchmark-storage=file://runs/benchmarks --benchmark-columns=median,iqr,min,rounds \
		$(if $(wildcard runs/benchmarks/*/0001_*.json),--benchmark-compare='*/0001' \
		--benchmark-compare-fail=min:100%,--benchmark-autosave)

clean:
	rm -rf .venv .venv-newest .venv-oldest .site runs

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "the documentation is in .site/index.html"

# torch and torchvision come from one index in one call: their builds must match. What pip says is
# in pip.log of the venv, and on the screen where it fails.
define install
	@test -e $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@echo "installing $(1) into $(@D) (torch with its CUDA libraries takes 5.2 GB, all else below 1 GB;"
	@echo "without a GPU see README.md, Install, first); minutes, depending on the network"
	@$(@D)/bin/python -m pip install --quiet --upgrade pip "setuptools>=77" > $(@D)/pip.log 2>&1 && \
	$(@D)/bin/python -m pip install --quiet --no-compile --no-build-isolation $(VERSIONS) \
		-e ".[$(1)]" >> $(@D)/pip.log 2>&1 || { cat $(@D)/pip.log; exit 1; }
	@touch $@
endef

.venv/demo: pyproject.toml constraints.txt
	$(call install,cpu$(comma)demo)

$(READY): pyproject.toml constraints.txt
	$(call install,cpu$(comma)bench$(comma)test$(comma)recipes)
	@touch $(@D)/demo

.venv/docs: pyproject.toml
	$(call install,docs)

# other people's attacks, for the tests that compare ours with them; they name versions of their own;
# and Ray
.venv/peers: .venv/ready
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[peers,ray]"
	touch $@
