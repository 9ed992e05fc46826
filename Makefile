# `make` alone lists the verbs. Each makes the environment it needs, and running one again is quick and harmless.

PYTHON ?= python3
VENV ?= .venv
RUN_DIR ?= .run
CONFIG ?= serve_config.yaml
RAY_DASHBOARD_PORT ?=
SERVE_PORT ?=
CLUSTER ?= local
TWIN ?=
IDLE_MINUTES ?=
LAUNCH_S ?=
STOCK_OUT ?=
PREEMPTION ?=
NODE ?=
LINES ?= 30
FOLLOW ?=
ONCE ?=
TESTS ?=
UV_VERSION := 0.13.9

py := $(VENV)/bin/python
ops := $(py) -m ops.
at := --run-dir "$(RUN_DIR)"
place := $(if $(filter local,$(CLUSTER)),local,remote)
behaviour = --idle-minutes "$(IDLE_MINUTES)" --launch-s "$(LAUNCH_S)" --stock-out "$(STOCK_OUT)" --preemption "$(PREEMPTION)"
# Whether the user named a Python; if not, an environment that another one made will do.
named := $(if $(filter file,$(origin PYTHON)),,--this-python)

# Packages are installed uncompiled; without this each start of each process would compile them anew.
unexport PYTHONDONTWRITEBYTECODE
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help demo up deploy status monitor logs dashboard address attach preempt undeploy down test check format
.PHONY: golden demo-quality train-demo lock clean runtime dev parity gcp check-config api-key
.PHONY: bench-engine bench-overhead bench-coldstart

help: ## List the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: runtime ## Install, start, deploy and draw eight pictures into outputs/
	@$(MAKE) up deploy
	@$(ops)demo $(at)

up: runtime ## Start a local twin of TWIN=cluster.yaml, or have one that is up change its IDLE_MINUTES= LAUNCH_S= STOCK_OUT= PREEMPTION=
	@$(ops)$(place) up $(at) --dashboard-port "$(RAY_DASHBOARD_PORT)" --twin "$(TWIN)" $(behaviour)

deploy: runtime ## Deploy CONFIG=serve_config.yaml and wait until it serves (SERVE_PORT= overrides its port)
	@$(ops)deploy deploy $(at) --config "$(CONFIG)" --serve-port "$(SERVE_PORT)"

status: runtime ## Say what is up, deployed and healthy
	@$(ops)deploy status $(at)

monitor: runtime ## Follow what the autoscaler does, until Ctrl-C; with ONCE=1 tell how it is
	@$(ops)$(place) monitor $(at) $(if $(ONCE),--once)

logs: runtime ## Show the replicas' last LINES=30 log lines, and with FOLLOW=1 what comes
	@$(ops)logs $(at) --lines $(LINES) $(if $(FOLLOW),--follow)

dashboard: runtime ## Say where Ray's dashboard is
	@$(ops)$(place) dashboard $(at)

address: ## Print what plain ray, serve and curl need: eval "$$(make -s address)"
	@$(MAKE) runtime >&2
	@$(ops)$(place) address $(at)

attach: runtime ## Open a shell in which plain ray, serve and curl reach the cluster
	@$(ops)$(place) attach $(at)

preempt: runtime ## Have a node of the twin taken away, NODE= or the youngest: notice at once, the end 30 s later
	@$(ops)$(place) preempt $(at) --node "$(NODE)"

undeploy: runtime ## Take everything off the cluster, which stays up
	@$(ops)deploy undeploy $(at)

down: runtime ## End what `make up` started in this checkout, and nothing else
	@$(ops)$(place) down $(at)

test: dev ## Run the tests; TESTS="tests/test_x.py -k name" for some
	@$(py) -m pytest $(TESTS)

check: dev ## Check format, lint and types
	@$(py) -m ruff format --check
	@$(py) -m ruff check
	@$(py) -m mypy

check-config: runtime ## Lint FILES= (all configs here) against Ray's own models, the app's Args and one another
	@$(ops)lint $(or $(FILES),serve_config.yaml cluster.yaml $(sort $(wildcard configs/*.yaml)))

api-key: runtime ## Make an API key: NAME=alice [FILE=api_keys.yaml] [RPM=60] [CONCURRENT=4]
	@$(ops)api_key --name "$(NAME)" --file "$(or $(FILE),api_keys.yaml)" --rpm "$(RPM)" --concurrent "$(CONCURRENT)"

format: dev ## Rewrite the code in the house format
	@$(py) -m ruff check --fix --select I
	@$(py) -m ruff format

golden: parity ## Make the golden arrays again with diffusers in PyTorch (several GB to install)
	@$(py) tests/make_golden.py

demo-quality: runtime ## Measure how often the demo model draws what was asked for
	@$(py) -m jobs.demo_quality

train-demo: dev ## Train the demo model (hours; goes on where it was interrupted)
	@$(py) -m jobs.train_demo

bench-engine: runtime ## Measure the engine against whole batches: latency, slowdown, throughput (about 12 minutes)
	@$(py) -m benchmarks.engine

bench-overhead: runtime ## Measure what HTTP and mixed requests cost over the pipeline's own loop
	@$(py) -m benchmarks.overhead

bench-coldstart: dev ## Measure a start with compiled programs at hand against one without
	@$(py) -m benchmarks.coldstart

# uv resolves for every platform at once, which pip cannot. It has an environment of its own, so that it is in no lock.
uv := .cache/uv-$(UV_VERSION)/bin/uv
lock := $(uv) pip compile pyproject.toml --universal --generate-hashes --no-emit-index-url --no-header \
	--quiet --python-version 3.11

lock: ## Pin requirements/*.txt again from pyproject.toml
	@test -x $(uv) || \
		{ $(PYTHON) -m venv .cache/uv-$(UV_VERSION) && $(dir $(uv))pip install -q --disable-pip-version-check uv==$(UV_VERSION); }
	@$(lock) -o requirements/runtime.txt
	@$(lock) -c requirements/runtime.txt --extra tpu -o requirements/tpu.txt
	@$(lock) -c requirements/runtime.txt --extra gcp -o requirements/gcp.txt
	@$(lock) -c requirements/runtime.txt --extra dev -o requirements/dev.txt
	@$(lock) -c requirements/runtime.txt --extra dev --extra parity -o requirements/parity.txt
	@echo "Pinned requirements/*.txt anew. The next make installs what changed."

clean: ## Remove caches; .venv, outputs/ and what is up stay
	@rm -rf .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find app jobs ops tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The environments, each by the requirement file of its name.
runtime dev parity gcp:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON). Install Python 3.11 or newer, or name another one: make PYTHON=..."; exit 1; }
	@$(PYTHON) ops/install.py $@ --venv $(VENV) $(named)
