# Every target sets up what it needs in .venv by itself; a second run starts at once.
# Another Python: make test PYTHON=python3.13

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The stamps carry the interpreter's version, so that another PYTHON gets a new .venv.
TAG := $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
MADE := $(VENV)/.made-$(TAG)
RUNTIME := $(VENV)/.runtime-$(TAG)
DEV := $(VENV)/.dev-$(TAG)
PROXY := $(VENV)/.proxy-$(TAG)
AUDIT := $(VENV)/.audit-$(TAG)

# What the lock is made with: all that the package runs on. Those that are not here: LOCK_PYTHONS=
LOCK_PYTHONS ?= python3.10 python3.11 python3.12 python3.13

PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet install
export PYTHONNOUSERSITE := 1
unexport PYTHONPATH

# The oldest that the extra allows, one between, and the last before LiteLLM's compiled core.
# Of these, 1.106.2 needs mcp for tools and responses, but does not ask for it.
VERSIONS ?= 1.100.5 1.106.2 1.109.3
PER_VERSION := $(addprefix tests/litellm/,test_routing.py test_failover.py test_leases.py test_words.py provider)

.PHONY: help setup demo test check lock bench versions clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## say what there is to make
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(DEV) $(PROXY) $(AUDIT) ## install all that tests and checks need; each target does so by itself

demo: $(RUNTIME) ## route requests over simulated nodes, on this machine alone
	@$(BIN)/hydra-llm demo

# One process: a second one on two cores unsettles what is timed. ARGS="-n 2" takes two all the same.
test: $(DEV) $(PROXY) ## run the tests; ARGS="-k lease" chooses some
	@echo "test: running the tests"
	@$(BIN)/python -m pytest -q $(ARGS)

check: $(DEV) $(AUDIT) ## check format, lint, types, imports, packaging and advisories
	@echo "check: format"
	@$(BIN)/ruff format --quiet --check . || { echo "mend it with: $(BIN)/ruff format"; exit 1; }
	@echo "check: lint"
	@$(BIN)/ruff check --quiet .
	@echo "check: types (mypy --strict, then pyright)"
	@$(BIN)/mypy --strict --no-error-summary
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python --warnings
	@echo "check: imports between rooms"
	@$(BIN)/lint-imports --no-logo
	@echo "check: packaging"
	@$(BIN)/python -m pytest -q tests/packaging
	@echo "check: lock and advisories"
	@$(BIN)/python -m tests.packaging.audit $(VENV)/audit/bin/python

lock: $(DEV) ## pin the newest versions of what the developers' environment is made of
	@$(BIN)/python -m tests.packaging.lock $(LOCK_PYTHONS)

bench: $(DEV) ## measure what routing costs
	@echo "bench: measuring"
	@$(BIN)/python -m pytest -q tests/benchmarks --benchmark-only $(ARGS)

versions: ## run LiteLLM's tests on older versions of it; VERSIONS="1.106.2" chooses
	@for version in $(VERSIONS); do \
		echo "versions: LiteLLM $$version"; \
		test -f $(VENV)/litellm-$$version/.made || { \
			$(PYTHON) -m venv --clear $(VENV)/litellm-$$version && \
			$(VENV)/litellm-$$version/bin/python -m pip --disable-pip-version-check --quiet --quiet install \
				--editable '.[cli,litellm,redis]' "litellm==$$version" \
				hypothesis mcp pytest pytest-asyncio pytest-recording pytest-timeout && \
			touch $(VENV)/litellm-$$version/.made; } || exit 1; \
		$(VENV)/litellm-$$version/bin/python -m pytest -q $(PER_VERSION) $(ARGS) || exit 1; \
	done

clean: ## remove .venv and everything built
	@echo "clean: removing .venv, caches and what was built"
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache \
		.hypothesis .benchmarks
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The proxy pins much that the developers' tools want otherwise, so it lives beside them. The
# version is the newest that its own requirements let pip install.
$(PROXY): pyproject.toml setup.py | $(MADE)
	@echo "set-up: installing LiteLLM's proxy for its tests (about a minute, once)"
	@$(PYTHON) -m venv --clear $(VENV)/proxy
	@$(VENV)/proxy/bin/python -m pip --disable-pip-version-check --quiet --quiet install \
		--editable '.[cli,litellm,redis]' 'litellm[proxy]==1.108.7'
	@touch $@

$(MADE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "hydra-llm needs Python 3.10 or newer; '$(PYTHON)' is $(or $(TAG),not there)." >&2; \
		echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "set-up: creating $(VENV) with Python $(TAG)"
	@$(PYTHON) -m venv --clear $(VENV) || { \
		echo "This Python cannot make virtual environments; on Debian: apt install python3-venv" >&2; \
		exit 1; }
	@touch $@

# Beside them as well, and not needed: without it the lock alone is checked.
$(AUDIT): | $(MADE)
	@echo "set-up: installing pip-audit (a quarter of a minute, once)"
	@$(PYTHON) -m venv --clear $(VENV)/audit && $(VENV)/audit/bin/python -m pip --retries 1 \
		--disable-pip-version-check --quiet --quiet install 'pip-audit>=2.7,<3' && touch $@ || \
		echo "set-up: pip-audit cannot be had here; advisories will not be asked for"

$(RUNTIME): pyproject.toml setup.py | $(MADE)
	@echo "set-up: installing hydra-llm and its command line"
	@$(PIP) --editable '.[cli]'
	@touch $@

# Where not all that is locked can be had (a mirror that lags behind, another platform) the newest
# will do, and `make check` says so.
$(DEV): pyproject.toml setup.py constraints.txt | $(MADE)
	@echo "set-up: installing hydra-llm and the developers' tools (about a minute, once)"
	@rm -f $(VENV)/.newest
	@$(PIP) --constraint constraints.txt --editable '.[dev]' 2>$(VENV)/.locked.log || { \
		echo "set-up: not all versions in constraints.txt can be had here; taking the newest"; \
		$(PIP) --editable '.[dev]' && touch $(VENV)/.newest; }
	@echo "set-up: downloading langchain-ollama's own tests, which ours run"
	@$(BIN)/python -m pip --disable-pip-version-check --quiet --quiet download --no-deps \
		--no-binary langchain-ollama --dest $(VENV)/upstream \
		"langchain-ollama==$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("langchain-ollama"))')"
	@touch $(RUNTIME) $@
