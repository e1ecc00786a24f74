# The two commands of a newcomer are `make run` and `make test`; the rest is in the README.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed
export DVC_NO_ANALYTICS := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: run test browser check bench bench-data bench-classifier bench-detectors ui serve-pipelines drill environment lock

environment: $(STAMP)

run: $(STAMP)
	@loupe run $(if $(DATA),--data '$(DATA)') $(foreach change,$(SET),--set '$(change)')

# Many tests wait for servers and programs, so that two processes take little more than half the time of one. A file stays
# with one of them, as its tests share projects and servers; in the order of folders, the slow flows do not come last. One
# thread each, as torch's would wait for each other.
test: $(STAMP) browser
	OMP_NUM_THREADS=1 pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

# Tests open the reports in Debian's Chromium, and are skipped where there is none.
browser:
	@if ! command -v chromium && command -v apt-get && test "$$(id -u)" = 0; then \
	  apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends chromium; \
	fi >/dev/null 2>&1 || echo "chromium could not be installed: tests that need it are skipped"

check: $(STAMP)
	ruff check .
	ruff format --check .
	mypy
	lint-imports

bench: bench-data bench-classifier bench-detectors

bench-data: $(STAMP)
	python benchmarks/data.py

bench-classifier: $(STAMP)
	python benchmarks/classifier.py

# TILE=/path/to/magnetic_tile measures that data set too.
bench-detectors: $(STAMP)
	python benchmarks/detectors.py $(if $(TILE),--tile '$(TILE)')

# Promotion, what it keeps out, and rollback, with real trainings in a folder of its own; nothing here is touched.
drill: $(STAMP)
	@python -m pipelines.drill

ui: $(STAMP)
	@loupe ui

# Prefect's server, the deployments of prefect.yaml and a worker, until Ctrl-C. CRON="* * * * *" replaces the schedule.
serve-pipelines: $(STAMP)
	@python -m pipelines.serving $(if $(PORT),--port '$(PORT)') $(if $(CRON),--cron '$(CRON)')

# The environment is made once, and again where the lock file has changed. The lock is complete: nothing is resolved here.
# The tables of Prefect's database belong to it: to make them takes longer than all of Prefect's work on a first run.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or later is needed; name one with make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	PREFECT_HOME=.prefect $(BIN)/prefect server database upgrade --yes >/dev/null
	@touch $@

# Resolve the lock file anew; `uv` is needed for this alone.
lock:
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --upgrade \
	  --custom-compile-command 'make lock' --extra dev --output-file requirements.txt pyproject.toml
