# One verb, one command. `make demo` and `make test` need Python 3.11 or later and nothing else.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# Where the verbs below read and write; override any of them on the command line.
LOG ?= demo/log
NAME ?= demo-imn-3p
RUN_FOLDER ?= runs/$(NAME)
BUNDLE ?= bundles/$(NAME)

.PHONY: install demo test check format train export backfill serve bench fuzz clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# make demo [DATA=<log>] [MODEL=imn|sasrec|pkm_act] [ONCE=1] [PORT=8000]
demo: install
	@exec $(RUN) -m loadtest demo $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data '$(DATA)') $(if $(ONCE),--once) $(if $(PORT),--port $(PORT))

test: install
	$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

check: install
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(RUN) -m tests.audit

format: install
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# make train NAME=demo-imn-3p LOG=<prepared log>
train: install
	$(RUN) -m training train $(NAME) $(LOG) $(RUN_FOLDER) --resume

export: install
	$(RUN) -m exporter $(RUN_FOLDER)/model.pt $(BUNDLE)

serve: install
	exec $(RUN) -m service --bundle $(BUNDLE)

# Fills Redis (REDIS_URL) with the histories of a prepared log.
backfill: install
	$(RUN) -m service backfill $(LOG) --bundle $(BUNDLE)

# Prints the tables of docs/results; takes minutes, gates nothing.
bench: install
	$(RUN) -m tests.benchmarks.imn_graphs
	$(RUN) -m tests.benchmarks.encoding
	$(RUN) -m tests.benchmarks.loader
	$(RUN) -m tests.benchmarks.product_keys
	$(if $(DATA),$(RUN) -m tests.benchmarks.prepare '$(DATA)')
	for name in engine length overhead overload growth peers; do $(RUN) -m loadtest $$name || exit 1; done

# A coverage-guided fuzzer and schemathesis at what the service decodes; takes an hour, gates nothing.
fuzz: install
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	$(RUN) -m tests.fuzz
	$(RUN) -m tests.service.openapi

clean:
	rm -rf $(VENV) demo runs bundles build *.egg-info
