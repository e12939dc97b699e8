# make quickstart: train, score and use a real recogniser on this CPU.   make test: run the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart speedrun smoke test test-all format lint type-check check size bench docs clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/pip install --quiet -e '.[quickstart,serve,demo,dev]' -c constraints.txt
	touch $@

install: .venv/installed

quickstart: install
	$(BIN)/tiny-audio quickstart

speedrun: install  # about an hour on two cores; an interrupted run starts anew
	for seed in 0 1 2; do \
	  out=outputs/speedrun/seed$$seed; test -e $$out/summary.json || \
	  $(BIN)/tiny-audio quickstart run.seed=$$seed run.output_dir=$$out run.fresh=true || exit; \
	done
	@echo 'done; CONTRIBUTING.md says how to add outputs/speedrun to the leaderboard'

test: install
	$(BIN)/tiny-audio dev test

test-all: install
	$(BIN)/tiny-audio dev test --numprocesses=0 -m ''

smoke format lint type-check check: install
	$(BIN)/tiny-audio dev $@

size: install
	$(BIN)/python tests/test_house.py

bench: install
	$(BIN)/python bench/training_speed.py

docs: install  # the figures, and the documentation as a site, in site/
	$(BIN)/python bench/figures.py
	$(BIN)/zensical build

clean:
	rm -rf .venv site .cache
