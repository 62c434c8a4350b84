# make demo: four methods, two seeds each, trained and attacked; a table and two plots (4 minutes)
# make test: everything CI runs (ruff, then pytest)
# make prove: the tests that are too long for every change (marked `long`)
# make fuzz: 32,000 drawn sequences of events beside the oracle, with fresh seeds (35 minutes)
# make survive: kill trainings at random moments, 30 times a method; the bits must be the same
# make docs: the documentation with the API reference, in .site
.PHONY: demo test prove fuzz survive lint bench docs clean

PYTHON ?= python3
BIN := .venv/bin
comma := ,

demo: .venv/demo
	@echo "training 4 methods with 2 seeds and attacking them: 4 minutes on two cores"
	$(BIN)/python -m bench compare --demo

# a thread for each of the two processes: more only wait for each other
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

prove: .venv/ready
	$(BIN)/python -m pytest -m long

fuzz: .venv/ready
	$(BIN)/python -m tests.sequences --examples 20000
	$(BIN)/python -m tests.sequences --examples 10000 --backend numba
	$(BIN)/python -m tests.sequences --examples 2000 --backend triton --events 4

survive: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.survive --kills 30

lint: .venv/ready
	$(BIN)/ruff check .

# The first call keeps its times, in runs/benchmarks; later ones fail where something takes more
# than twice as long at its fastest (another program's load adds to the median, less to the
# minimum). After `rm -r runs/benchmarks` the next call is the first.
bench: .venv/ready
	$(BIN)/python -m pytest tests/test_speed.py --benchmark-enable --benchmark-only \
		--benchmark-storage=file://runs/benchmarks --benchmark-columns=median,iqr,min,rounds \
		$(if $(wildcard runs/benchmarks/*/0001_*.json),--benchmark-compare='*/0001' \
		--benchmark-compare-fail=min:100%,--benchmark-autosave)

clean:
	rm -rf .venv .site runs

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "the documentation is in .site/index.html"

# torch and torchvision come from one index in one call: their builds must match. What pip says is
# in .venv/pip.log, and on the screen where it fails.
define install
	@test -e $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing $(1) into .venv (torch with its CUDA libraries takes 5.2 GB, all else below 1 GB;"
	@echo "without a GPU see README.md, Install, first); minutes, depending on the network"
	@$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" > .venv/pip.log 2>&1 && \
	$(BIN)/python -m pip install --quiet --no-compile --no-build-isolation -e ".[$(1)]" \
		>> .venv/pip.log 2>&1 || { cat .venv/pip.log; exit 1; }
	@touch $@
endef

.venv/demo: pyproject.toml
	$(call install,cpu$(comma)demo)

.venv/ready: pyproject.toml
	$(call install,bench$(comma)test$(comma)recipes)
	@touch .venv/demo

.venv/docs: pyproject.toml
	$(call install,docs)
