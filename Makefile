# The front door. `make` alone lists what there is.

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup setup-dev run test check format lock bench soak footprint clean distclean

# The first Python on the path that is new enough and can make virtual environments.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$python -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; \
	done)
# auto, cpu or cuda: which build of vLLM goes into .venv-engine
ENGINE ?= auto
# more arguments for pytest, e.g. PYTEST_ARGS="-k scaling"
PYTEST_ARGS ?=
BIN := .venv/bin
CACHE := $(or $(PILOTLIGHT_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/pilotlight)

define set-up
@python='$(PYTHON)'; [ -n "$$python" ] || { \
	echo 'make: no Python 3.11 or newer with the module ensurepip was found. Install one (Debian and Ubuntu:' >&2; \
	echo 'apt-get install python3 python3-venv), or name it: make PYTHON=/path/to/python3' >&2; exit 2; }; \
	exec $$python tools/setup.py
endef

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "make %-10s %s\n", $$1, $$2 }'

setup: ## install Pilotlight (.venv) and the engine (.venv-engine); again: nothing to do
	$(set-up) --engine $(ENGINE)

setup-dev:
	$(set-up) --dev --engine none

run: setup ## start, deploy the built-in model, ask it a question, keep serving; Ctrl-C stops all of it
	@exec $(BIN)/pilotlight up --demo

test: setup setup-dev ## every test but the soaks: the fast ones in parallel, then those with the real engine
	$(BIN)/pytest -m "not engine and not soak" -n 2 $(PYTEST_ARGS)
	$(BIN)/pytest -m "engine and not soak" -n 2 --dist loadfile $(PYTEST_ARGS)

check: setup-dev ## format, lint, types, layers, locks, reference pages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/locks.py --check
	$(BIN)/python tools/reference.py --check

format: setup-dev ## write the format, the safe fixes and the reference pages that `make check` asks for
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/python tools/reference.py

lock: ## resolve the dependencies again after pyproject.toml or a .in file changed (needs uv)
	$(PYTHON) tools/locks.py

bench: setup ## every benchmark, one JSON line per figure
	@$(BIN)/pilotlight bench gateway --json
	@$(BIN)/pilotlight bench queue --json
	@$(BIN)/pilotlight bench coldstart --json
	@$(BIN)/pilotlight bench throughput --json
	@$(BIN)/pilotlight bench routing --json
	@$(BIN)/pilotlight bench fairness --json
	@$(BIN)/pilotlight bench worker --json

soak: setup setup-dev ## what takes long: soaks and whole crash campaigns
	$(BIN)/pytest -m soak --timeout 0 -s $(PYTEST_ARGS)

footprint: ## build the base installation in a temporary folder and measure it against its limit
	$(PYTHON) tools/footprint.py

clean: ## remove environments and caches of this checkout; the engine stays in the user's cache
	rm -rf .venv .venv-engine .cache build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also remove the engines and test clients of all checkouts from the user's cache
	rm -rf "$(CACHE)/engines" "$(CACHE)/clients"
