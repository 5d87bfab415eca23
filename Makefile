# Every target works alone in a fresh clone: it creates .venv and installs what it needs.
#
#   PYTHON       interpreter that creates .venv                    make test PYTHON=python3.12
#   ARGS         passed to the program that the target runs        make test ARGS="-m slow"
#   PIP_ARGS     passed to pip, for example another package index  make test PIP_ARGS="--index-url URL"
#   CONSTRAINTS  file of versions; another has its own .venv-NAME  make test CONSTRAINTS=constraints-lowest.txt
#   EXTRA        installed for all targets, not an extra for each  make -j2 quality docs EXTRA=dev

PYTHON ?= python3
ARGS ?=
PIP_ARGS ?=
CONSTRAINTS ?= constraints.txt
EXTRA ?=

VENV := .venv$(patsubst constraints%.txt,%,$(CONSTRAINTS))
BIN := $(VENV)/bin
# --no-compile: Python compiles what it imports, a small part of what is installed.
PIP_INSTALL = $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c $(CONSTRAINTS) $(PIP_ARGS)

# Models and data are made or shipped locally, so nothing is fetched from the hub.
demo test bench docs results: export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: demo test quality style docs bench results clean help
# Two extras are not installed into one environment at the same time.
ifeq ($(EXTRA),)
.NOTPARALLEL:
endif

demo: $(VENV)/.installed-$(or $(EXTRA),train) ## Run the quickstart example
	$(BIN)/python -m examples.quickstart $(ARGS)

test: $(VENV)/.installed-$(or $(EXTRA),test) ## Run the tests
	$(BIN)/python -m pytest $(ARGS)

quality: $(VENV)/.installed-$(or $(EXTRA),dev) ## Check lint, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

style: $(VENV)/.installed-$(or $(EXTRA),dev) ## Fix lint and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.installed-$(or $(EXTRA),docs) ## Build the documentation, with its pictures
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

bench: $(VENV)/.installed-$(or $(EXTRA),examples) ## Run the benchmarks
	$(BIN)/python -m benchmarks $(ARGS)

# Nothing is measured again: tables go to outputs/results, pictures to docs/results/figures.
results: $(VENV)/.installed-$(or $(EXTRA),examples) ## Make the tables and pictures of docs/results from what is committed
	@mkdir -p outputs/results
	for model in smollm2 mpnet; do \
	  costs=docs/results/frontier_costs$$(test $$model = mpnet && echo _mpnet).jsonl; \
	  $(BIN)/python -m benchmarks.frontier table docs/results/frontier_$$model.jsonl --costs $$costs \
	    > outputs/results/frontier_$$model.md || exit 1; \
	  $(BIN)/python -m benchmarks.frontier plot docs/results/frontier_$$model.jsonl --costs $$costs \
	    --out docs/results/figures || exit 1; \
	done
	for runs in short cpu; do \
	  $(BIN)/python -m benchmarks.frontier table docs/results/frontier_smollm2_$$runs.jsonl \
	    > outputs/results/frontier_smollm2_$$runs.md || exit 1; \
	done
	$(BIN)/python -m benchmarks.crosslingual table docs/results/crosslingual.jsonl > outputs/results/crosslingual.md
	$(BIN)/python -m benchmarks.gpu --table docs/results/gpu.json > outputs/results/gpu.md
	$(BIN)/python -m benchmarks.compare report docs/results/comparison.jsonl --against lora --out outputs/results/comparison
	$(BIN)/python -m benchmarks.compare report docs/results/ablation.jsonl --against lora --out outputs/results/ablation
	$(BIN)/python -m benchmarks.rank_memory > outputs/results/rank_memory.md

clean: ## Remove .venv, caches and build output
	rm -rf .venv .venv-* build dist site docs/pictures *.egg-info .pytest_cache .ruff_cache
	find . -type d -name __pycache__ -prune -exec rm -rf {} +

help: ## List the targets
	@grep -E '^[a-z]+:.* ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.* ## /\1\t/' | expand -t 10

# torch goes in first, pinned: an unpinned one would bring several gigabytes of CUDA packages.
$(VENV)/.installed-torch: $(CONSTRAINTS)
	@echo "Creating $(VENV) and installing torch"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) torch
	@touch $@

# One stamp for each extra of pyproject.toml.
$(VENV)/.installed-%: $(VENV)/.installed-torch pyproject.toml $(CONSTRAINTS)
	@echo "Installing peft-sparsegrad[$*]"
	@$(PIP_INSTALL) -e ".[$*]"
	@touch $@
