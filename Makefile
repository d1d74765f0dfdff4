# The two commands are `make paper` and `make test`; each sets up what it needs. `make` alone lists the others.

PROFILE ?= quick
SEED    ?= 0
PYTHON  ?= python3
SNAKEMAKE_ARGS ?=
PYTEST_ARGS ?=

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN   := $(PROFILE)$(if $(filter-out 0,$(SEED)),-seed$(SEED))
UV_VERSION := 0.13.9
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
TEX_PACKAGES := texlive-latex-base texlive-latex-recommended texlive-fonts-recommended latexmk

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup paper figures compare claims test lint executed docs package lab export readme lock tex clean

export UV_HTTP_TIMEOUT ?= 600
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PYTHONUNBUFFERED = 1

help:  ## list these targets
	@echo 'make TARGET [PROFILE=smoke|quick|full] [SEED=1]'
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1@\2/p' $(MAKEFILE_LIST) | awk -F@ '{ printf "%-11s %s\n", $$1, $$2 }'

paper: tex $(STAMP)  ## every figure, table and number, then the PDF: paper/paper.pdf (with SEED=1: paper/build/PROFILE-seed1)
	@$(BIN)/python -m cvi_nb.paper build --profile '$(PROFILE)' --seed '$(SEED)' --target paper -- $(SNAKEMAKE_ARGS)
	@[ '$(SEED)' != 0 ] || cmp -s paper/build/$(RUN)/paper.pdf paper/paper.pdf || \
	  { cp paper/build/$(RUN)/paper.pdf paper/.paper.part && mv -f paper/.paper.part paper/paper.pdf; }
	@echo 'paper/build/$(RUN): paper.pdf, figures, tables, executed notebooks; paper/paper.pdf is the last one of seed 0'

figures: $(STAMP)  ## the same without LaTeX: paper/build/PROFILE
	@$(BIN)/python -m cvi_nb.paper build --profile '$(PROFILE)' --seed '$(SEED)' --target figures -- $(SNAKEMAKE_ARGS)
	@echo 'figures, tables and executed notebooks: paper/build/$(RUN)'

compare: $(STAMP)  ## what moved outside its interval between make paper and make paper SEED=1
	@$(BIN)/python -m cvi_nb.paper compare '$(PROFILE)' '$(PROFILE)-seed$(if $(filter-out 0,$(SEED)),$(SEED),1)'

claims: $(STAMP)  ## paper/claims.md: every number of the text, and where it comes from
	@$(BIN)/python -m cvi_nb.paper claims --profile '$(PROFILE)'

test: $(STAMP)  ## all tests, those in the notebooks included
	@OMP_NUM_THREADS=1 MPLBACKEND=agg $(BIN)/python -m pytest -n $$(( $(CORES) > 8 ? 8 : $(CORES) )) --dist worksteal $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff on notebooks and tests, mypy on the package
	@$(BIN)/ruff check .
	@$(BIN)/mypy

executed: $(STAMP)  ## the outputs of the last make paper PROFILE=… into the notebooks of nbs/paper, which are committed executed
	@$(BIN)/python -m cvi_nb.paper executed --profile '$(PROFILE)'
	@PATH="$$PWD/$(BIN):$$PATH" nbdev_clean

docs: $(STAMP)  ## the pages: build/docs/html, from the notebooks as they are; a warning or a broken link is an error
	@$(BIN)/python nbs/docs/build.py

package: $(STAMP)  ## sdist and wheel, and the README's examples from the wheel in a clean environment
	@$(BIN)/python tests/package.py --python $(BIN)/python

lab: $(STAMP)  ## JupyterLab on the notebooks
	@$(BIN)/jupyter lab $$([ "$$(id -u)" = 0 ] && echo --allow-root) --notebook-dir nbs

export: $(STAMP)  ## write cvi_nb/ from nbs/ and clean the notebooks
	@PATH="$$PWD/$(BIN):$$PATH" sh -c 'nbdev_export && nbdev_clean'

readme: $(STAMP)  ## write README.md from nbs/index.ipynb
	@$(BIN)/python -m cvi_nb.paper readme README.md

lock: $(STAMP)  ## bring requirements.lock up to date with settings.ini (UPGRADE=1: newer versions of everything)
	@$(BIN)/uv pip compile --quiet --universal --generate-hashes $(if $(UPGRADE),--upgrade) setup.py --all-extras -o requirements.lock

clean:  ## remove what was built, but not .venv
	@rm -rf paper/build paper/paper.pdf .snakemake .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	@find cvi_nb nbs tests -name __pycache__ -prune -exec rm -rf {} +

setup: $(STAMP)  ## the environment alone: .venv

# What it takes from a bare Debian: python3, make and a compiler. One at a time, for two would write into the same .venv.
$(STAMP): requirements.lock settings.ini setup.py $(wildcard cvi_nb/*.c cvi_nb/*/*.c)
	@{ if command -v flock >/dev/null && ! flock -n 9; then echo 'another make is setting up .venv: waiting for it'; flock 9; fi; \
	   if [ -e $@ ] && [ -z "$$(find $^ -newer $@)" ]; then exit 0; fi; \
	   set -e; \
	   $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	     echo "Python 3.11 or newer is needed, and $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	     echo 'If another one is installed, name it: make PYTHON=python3.12 …' >&2; exit 1; }; \
	   if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	     echo '[1/4] a virtual environment in .venv'; \
	     $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(call apt,python3-venv,Python lacks its venv module); \
	     $(PYTHON) -m venv --clear $(VENV); \
	   fi; \
	   echo '[2/4] uv, the installer'; \
	   $(BIN)/python -m pip install --quiet 'uv==$(UV_VERSION)'; \
	   echo '[3/4] the packages of requirements.lock (about 6 GB with PyTorch, from the cache if they are there)'; \
	   $(BIN)/uv pip install --python $(BIN)/python --no-deps --require-hashes -r requirements.lock; \
	   echo '[4/4] cvi_nb itself, editable'; \
	   $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .; \
	   if [ -e .git ] && command -v git >/dev/null; then $(git_hooks); fi; \
	   touch $@; \
	 } 9>.setup.lock

# Notebooks merge cell by cell, and merged ones are trusted again. What nbdev_install_hooks sets up, but for this clone only: nothing
# is written into the home folder, and the environment need not be activated.
define git_hooks
hooks=$$(git rev-parse --git-path hooks 2>/dev/null) && mkdir -p "$$hooks" && \
git config --local merge.nbdev-merge.name 'merge notebooks cell by cell' && \
git config --local merge.nbdev-merge.driver '$(BIN)/nbdev_merge %O %A %B %P' && \
{ [ -e "$$hooks/post-merge" ] || { printf '#!/bin/sh\n$(BIN)/nbdev_trust\n' > "$$hooks/post-merge" && chmod +x "$$hooks/post-merge"; }; } || \
echo 'git hooks could not be installed; everything else works'
endef

# $(call apt,packages,what is wrong): as root install Debian packages, else say what to type.
define apt
{ if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
    echo '$(2): installing $(1)'; \
    export DEBIAN_FRONTEND=noninteractive; \
    apt-get update -qq && apt-get install -y -qq --no-install-recommends $(1) >/dev/null; \
  else \
    echo '$(2). On Debian or Ubuntu:' >&2; \
    echo '  sudo apt-get update && sudo apt-get install -y --no-install-recommends $(1)' >&2; \
    $(3) exit 1; \
  fi; }
endef

tex:
	@command -v latexmk >/dev/null && command -v pdflatex >/dev/null || \
	 $(call apt,$(TEX_PACKAGES),LaTeX is missing,echo 'Without it: make figures' >&2;)
