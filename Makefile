# Every target sets up .venv by itself; deploy/bootstrap.sh says how, and takes PYTHON and TORCH_INDEX_URL.

PORT ?= 8000
PY := .venv/bin/python
# Threads that spin while they wait would slow down whatever shares the machine; nothing may be fetched at run time.
CALM := OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help demo test lint audit format docs site pins clean distclean

help: ## Show this
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

demo: ## Serve a small base and its demo experts on 127.0.0.1:8000 (PORT=...)
	@deploy/bootstrap.sh run
	@base="$$($(PY) -m examples.base)" && \
	exec env $(CALM) SWITCHYARD_DATA_DIR=.cache/demo SWITCHYARD_CACHE_DIR=.cache .venv/bin/switchyard serve \
		--base "$$base" --base-name smollm2-135m-instruct --experts examples/experts --host 127.0.0.1 --port $(PORT)

test: lint ## Check style and types, then run the tests (ARGS=... goes to pytest)
	@$(CALM) $(PY) -m pytest $(ARGS)

lint: ## Check style and types
	@deploy/bootstrap.sh dev
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m mypy

audit: ## Look for committed secrets, and on osv.dev for known holes in what is pinned
	@deploy/bootstrap.sh dev
	@$(PY) -m deploy.secret_scan
	@$(PY) -m pip_audit --strict --disable-pip --no-deps --requirement constraints.txt --vulnerability-service osv $(ARGS)

format: ## Put the code into the project's style
	@deploy/bootstrap.sh dev
	@$(PY) -m ruff check --fix
	@$(PY) -m ruff format

docs: ## Write the generated tables and pages of docs/ anew
	@deploy/bootstrap.sh dev
	@$(PY) -m deploy.tables

site: ## Build the documentation as a site, in site/
	@deploy/bootstrap.sh dev
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

pins: ## Write constraints.txt anew from what .venv holds
	@$(PY) -m deploy.pins >constraints.tmp && mv constraints.tmp constraints.txt

clean: ## Remove .venv and what the tools leave behind; .cache stays
	rm -rf .venv build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis constraints.tmp
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

distclean: clean ## Remove .cache too: converted base, demo data, downloads, fine-tunes
	rm -rf .cache
