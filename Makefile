# Every target sets up .venv first when it is missing or older than pyproject.toml or constraints.txt.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# As `camelid train` does by itself; here it is for every library alike (glibc on Linux).
HUGE := GLIBC_TUNABLES=glibc.malloc.hugetlb=1
STAMP := $(VENV)/.stamp
# Processes that run tests; each takes up to 5 GB.
JOBS ?= 2

# The stamp holds the folder it was made in: a venv that was copied or moved still points to the old one.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(shell rm -f $(STAMP))
endif

.DEFAULT_GOAL := help
.PHONY: help demo test check bench docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## train, evaluate and use a small Llama, offline, in minutes (MODEL=path finetunes yours)
	@$(RUN) -m camelid demo $(if $(MODEL),--model "$(MODEL)")

test: $(STAMP) ## run the tests (ARGS="-k rope -x" goes to pytest, JOBS=4 are processes)
	@$(RUN) -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

check: $(STAMP) ## lint, format and types, as CI does
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(RUN) -m pyright --pythonpath $(RUN)

bench: $(STAMP) ## time training, decoding and loading (ARGS goes to benchmarks/run.py)
	@$(HUGE) $(RUN) benchmarks/run.py $(ARGS)

docs: $(STAMP) ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet --strict
	@echo "Open site/index.html"

clean: ## remove .venv, caches and built files; runs/ stays
	@rm -rf $(VENV) .cache site dist build .pytest_cache .ruff_cache
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here. Name a Python 3.11 or newer: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "camelid needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@test -f $@ || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing camelid and its development tools into $(VENV) (takes some minutes, once)"
	@$(RUN) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@echo "$(CURDIR)" > $@
