# make demo   train the demo model and show that it follows constraints better (6 GB of memory)
# make test   the tests
# make test-oldest   the tests with the lowest versions that setup.cfg allows, in .venv-oldest (9 GB)
# make lint   ruff and mypy
# make bench  the CPU benchmarks behind docs/performance.md
# Each makes its virtual environment in .venv on first use; VENV= names another place.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test test-oldest lint bench clean

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[demo,eval,slurm,dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m iopo.experiments.demo

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

# every bound name>=version of setup.cfg as name==version
test-oldest:
	test -d $(VENV)-oldest || $(PYTHON) -m venv $(VENV)-oldest
	sed -n 's/^    \([a-z-]*\)>=\([0-9.]*\).*/\1==\2/p' setup.cfg > $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/pip install --quiet -c $(VENV)-oldest/constraints.txt -e '.[demo,eval,slurm,dev]'
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -q -n 2 --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.linear_logprob --json benchmarks/results/linear_logprob_cpu.json
	$(BIN)/python -m benchmarks.throughput --json benchmarks/results/throughput_cpu.json

clean:
	rm -rf $(VENV) $(VENV)-oldest *.egg-info
