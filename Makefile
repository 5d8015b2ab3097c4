# Everything runs in .venv, which is made from Python 3.11.4 or newer and pyproject.toml when first needed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
LOWEST := .venv-lowest/.installed

.PHONY: help install quickstart reproduce test test-lowest lab mini-world clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

install: $(STAMP) ## make .venv with everything in it

$(STAMP): pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))' || \
		{ echo "Python 3.11.4 or newer is needed; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	@echo "Installing into .venv (minutes: PyTorch alone is several GB) ..."
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

quickstart: $(STAMP) ## the first pictures: notebook 00 on few images, into outputs/quickstart
	$(BIN)/ovdiff run notebooks/00_quickstart.ipynb --out outputs/quickstart -p images=8

reproduce: $(STAMP) ## every table and figure of the mini profile, into outputs/mini
	$(BIN)/ovdiff reproduce --profile mini

test: $(STAMP) ## the tests, two at a time; what takes long is in tests/slow, which continuous integration runs
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests/method tests/workbench tests/shipping

test-lowest: $(LOWEST) ## the tests of the method with the lowest versions that pyproject.toml allows
	.venv-lowest/bin/python -m pytest -q -n 2 tests/method

$(LOWEST): pyproject.toml .ci/lowest.py | $(STAMP)
	@echo "Installing the lowest versions into .venv-lowest (a minute) ..."
	@$(BIN)/python .ci/lowest.py
	@touch $@

lab: $(STAMP) ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

mini-world: $(STAMP) ## draw the mini world and train its models anew, into work/ (30 hours on two cores; needs npm; ARGS="--hours 8")
	$(BIN)/python -m ovdiff_lib.recipes.rebuild $(ARGS)

clean: ## delete caches and executed notebooks; committed tables and figures stay
	rm -rf outputs/*/cache outputs/*/*.ipynb outputs/*/*.stamp.json .pytest_cache .ruff_cache .hypothesis build
	find . -path './.venv*' -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
