# Every target creates .venv, or updates it if the lock changed, and can be interrupted and run again.
.DEFAULT_GOAL := help
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed
# Parallel test processes; each test uses one thread. On two cores, the third runs while tests of the others wait.
JOBS ?= 3

.PHONY: help demo test integration images images-test image-locks lint format serve bench docs reference lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): requirements.lock $(wildcard requirements/*) pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not installed; install Python 3.11, or use another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "==> installing into .venv (once, a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python requirements/install.py $(BIN)/python
	@touch $@

demo: $(STAMP) ## Adapt a scorer to the built-in tasks, offline, and show how much it helps
	$(BIN)/cappy adapt --instances builtin --generator builtin --strategy sampling8 --set finetuning.epochs=2

test: $(STAMP) ## Run all tests except those that need servers
	$(BIN)/python -m pytest --ignore=tests/integration --ignore=tests/serving/test_load.py --numprocesses=$(JOBS) --dist=loadfile --no-loadscope-reorder
	@# The load test needs all cores.
	$(BIN)/python -m pytest tests/serving/test_load.py

integration: $(STAMP) .venv-servers/.installed ## Run the tests against real servers and clients; a test without its server is skipped
	$(BIN)/python -m pytest tests/integration

.venv-servers/.installed: requirements/servers.lock requirements/build.lock
	@echo "==> installing servers for tests into .venv-servers (once, a minute)"
	@test -x .venv-servers/bin/python || $(PYTHON) -m venv .venv-servers
	@for lock in build servers; do .venv-servers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --require-hashes --requirement requirements/$$lock.lock || exit 1; done
	@touch $@

images: $(STAMP) ## Build the container images; starts a Docker engine if none is running (TORCH=cuda, JAX=tpu)
	PYTHONPATH=. $(BIN)/python docker/engine.py $(BIN)/python docker/images.py

images-test: $(STAMP) ## Build, run and test the container images
	$(BIN)/python -m pytest tests/integration/test_images.py

image-locks: $(STAMP) ## Write the images' lock files from requirements.lock
	$(BIN)/python docker/locks.py

lint: $(STAMP) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=benchmarks $(BIN)/mypy $(filter-out %/images.py %/serving.py,$(wildcard benchmarks/*.py))

format: $(STAMP) ## Format the code and fix lint errors
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

serve: $(STAMP) ## Serve the champion on port 8080
	$(BIN)/cappy serve --scorer models:/cappy@champion --port 8080

bench: $(STAMP) ## Measure how much selection helps on real LLM outputs (reads ../shared/data; takes hours, can be resumed)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement benchmarks/requirements.txt
	$(BIN)/python benchmarks/selection.py

docs: $(STAMP) ## Build the documentation into build/site, offline
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "build/site/index.html; with search: $(BIN)/python -m http.server --directory build/site 8001"

reference: $(STAMP) ## Write docs/reference from the CLI and the public docstrings
	$(BIN)/python docs/reference.py

lock: $(STAMP) ## Write the lock files, with hashes, from the installed packages
	$(BIN)/python requirements/lock.py

clean: ## Remove .cappy (runs, registry, work folder), caches and builds; keeps .venv
	rm -rf .cappy .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
