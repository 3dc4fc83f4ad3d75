# make demo | make test: each does all of its own set-up. make setup alone creates the environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Another torch build than the pinned one, as pip takes it:
#   make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126"     (V100)
TORCH ?=

# Runs a command with a dot a second for progress; what it printed is shown only if it fails.
define quietly
	@$(1) > $(VENV)/install.log 2>&1 & pid=$$!; \
	while kill -0 $$pid 2>/dev/null; do printf .; sleep 1; done; \
	wait $$pid || { echo; tail -n 30 $(VENV)/install.log; echo "error: the installation failed; all of it is in $(VENV)/install.log"; exit 2; }
endef

.PHONY: help setup demo test lint lock clean FORCE

help:
	@echo "make demo    adapt, score and merge an embedded model on two tasks (under 5 minutes on 2 cores)"
	@echo "make test    linters and tests"
	@echo "make setup   the environment alone; TORCH='torch==... --index-url ...' chooses another torch build"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml .ci/constraints.txt $(if $(TORCH),FORCE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $$($(PYTHON) --version) is too old: zlora needs 3.10 or later. Name another: make setup PYTHON=python3.12"; exit 2; }
	@printf "installing into $(VENV) (some minutes, once) "
	@$(PYTHON) -m venv $(VENV)
	@grep -v $(if $(TORCH),'^torch==',-e '^$$') .ci/constraints.txt > $(VENV)/constraints.txt
	$(if $(TORCH),$(call quietly,$(BIN)/pip install --disable-pip-version-check $(TORCH)))
	$(call quietly,$(BIN)/pip install --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[dev]')
	@echo " done"
	@touch $@

demo: setup
	@$(BIN)/python jobs/demo/demo.py

# Two workers, each with ranks of its own: what one is idle for, the other does.
test: setup lint
	@$(BIN)/pytest --numprocesses 2 --dist worksteal

lint: setup
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --verbose | tail -n 12

# Renews the pins for every supported Python; needs uv.
lock:
	@echo "torch==2.13.0" | uv pip compile pyproject.toml --extra dev --universal --python-version 3.10 --upgrade \
		--constraints - --no-header --no-annotate --quiet \
		| sed -E -e '/^(nvidia-|triton|cuda-)/d' -e "s/ ; sys_platform == 'linux'$$//" -e "s/ and sys_platform == 'linux'//" \
		> .ci/constraints.txt

clean:
	rm -rf $(VENV) runs .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
