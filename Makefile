# `make` alone lists the verbs. Each makes the environment it needs, and running one again is quick and harmless.

PYTHON ?= python3
VENV ?= .venv
RUN_DIR ?= .run
CLUSTER ?= local
CONFIG ?= serve_config.yaml
RAY_DASHBOARD_PORT ?=
SERVE_PORT ?=
TWIN ?=
IDLE_MINUTES ?=
LAUNCH_S ?=
STOCK_OUT ?=
PREEMPTION ?=
NODE ?=
LINES ?= 30
FOLLOW ?=
ONCE ?=
CMD ?=
JOB ?=
export ARGS ?=
RESOURCES ?=
ID ?=
TESTS ?=
EXPECTED_SKIPS ?=
MODEL ?=
TPU ?=
SIZE ?=
RATE ?=
SLO ?=
DOLLARS ?=
SCENARIO ?= smoke
IMAGE ?=
URL ?=
ARGS ?=
MINUTES ?= 60
RESUME ?=
UV_VERSION := 0.13.9

py := $(VENV)/bin/python
verb := $(py) -m cluster.
at := --run-dir "$(RUN_DIR)"
# Where the cluster is: on this machine, or where a file for `ray up` puts it.
place := $(if $(filter local,$(CLUSTER)),local,remote)
where := --cluster "$(CLUSTER)"
its := $(at) $(if $(filter remote,$(place)),$(where))
needs := $(if $(filter remote,$(place)),gcp,runtime)
behaviour = --idle-minutes "$(IDLE_MINUTES)" --launch-s "$(LAUNCH_S)" --stock-out "$(STOCK_OUT)" --preemption "$(PREEMPTION)"
# Whether the user named a Python; if not, an environment that another one made will do.
named := $(if $(filter file,$(origin PYTHON)),,--this-python)

# What would have a Python find other modules than ours, or run otherwise (cluster/processes.py has the same list). Packages
# are installed uncompiled; with PYTHONDONTWRITEBYTECODE each start of each process would compile them anew.
unexport PYTHONPATH PYTHONHOME PYTHONSAFEPATH PYTHONPLATLIBDIR PYTHONUSERBASE PYTHONSTARTUP
unexport PYTHONINSPECT PYTHONOPTIMIZE PYTHONWARNINGS PYTHONDONTWRITEBYTECODE
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help demo up deploy status monitor logs dashboard address attach preempt undeploy down test test-quick test-jobs test-cluster check
.PHONY: test-faults test-chaos test-http-jobs-faults rehearse rehearse-faults rehearse-variants rehearse-gke rehearse-calls gke
.PHONY: format golden demo-quality demo-edits train-demo train-flow lock clean runtime dev parity gcp check-config api-key bench-engine bench-cluster
.PHONY: bench-devices bench-overhead bench-coldstart bench-plan libtpu tpu-check tpu-plan job jobs stop-job bench-batch
.PHONY: test-computing test-waiting test-browser page-pictures browser
.PHONY: bench-loadgen loadtest bench-torch test-parity fuzz soak cuda bench-gpu

help: ## List the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

cuda: ## Install JAX for NVIDIA GPUs too (several GB, Linux): then deploy CONFIG=configs/sd14-gpu.yaml

demo: runtime ## Install, start, deploy and draw eight pictures and edit one, into outputs/
	@$(MAKE) CLUSTER=local up deploy
	@$(verb)sample_images $(at)

up: $(needs) ## Start a cluster: CLUSTER=local, with the node types of cluster.yaml, or =cluster.yaml, which costs money
	@$(verb)$(place) up $(its) $(if $(filter local,$(place)),--dashboard-port "$(RAY_DASHBOARD_PORT)" --twin "$(TWIN)" $(behaviour))

deploy: $(needs) ## Lint and deploy CONFIG=serve_config.yaml and wait until it serves (SERVE_PORT= overrides its port)
	@$(verb)deploy deploy $(at) $(where) --config "$(CONFIG)" --serve-port "$(SERVE_PORT)"

status: $(needs) ## Say what is up, deployed and healthy
	@$(verb)deploy status $(at) $(where)

monitor: $(needs) ## Follow what the autoscaler does, until Ctrl-C; with ONCE=1 tell how a local one is
	@$(verb)$(place) monitor $(its) $(if $(ONCE),--once)

attach: $(needs) ## Open a shell where plain ray and serve work: on the head of CLUSTER=, which can run CMD= instead
	@$(verb)$(place) attach $(its) $(if $(CMD),--command "$(CMD)")

dashboard: $(needs) ## Say where the dashboard is; of CLUSTER=, bring it and the API to this machine's ports, until Ctrl-C
	@$(verb)$(place) dashboard $(its) $(if $(filter remote,$(place)),--dashboard-port "$(RAY_DASHBOARD_PORT)" --serve-port "$(SERVE_PORT)")

address: ## Print what plain ray, serve and curl need: eval "$(make -s address)"
	@$(MAKE) $(needs) >&2
	@$(verb)$(place) address $(its)

logs: $(needs) ## Show the replicas' last LINES=30 log lines, and with FOLLOW=1 what comes
	@$(verb)logs $(at) $(where) --lines $(LINES) $(if $(FOLLOW),--follow)

preempt: runtime ## Preempt a node of the local cluster, NODE= or the youngest: notice at once, the end 30 s later
	@$(verb)local preempt $(at) --node "$(NODE)"

undeploy: $(needs) ## Take everything off the cluster, which stays up
	@$(verb)deploy undeploy $(at) $(where)

job: $(needs) ## Run JOB=name ARGS="..." on the cluster and follow it, Ctrl-C stops it; ID=... follows one that runs
	@$(verb)job run $(at) $(where) --job "$(JOB)" --arguments="$$ARGS" --resources '$(RESOURCES)' --id "$(ID)"

jobs: $(needs) ## List the jobs that run on the cluster or have run there, with their states
	@$(verb)job list $(at) $(where)

stop-job: $(needs) ## Stop the job ID=
	@$(verb)job stop $(at) $(where) --id "$(ID)"

down: $(needs) ## End what `make up` started with the same CLUSTER=, and nothing else
	@$(verb)$(place) down $(its)

# Nothing up: to see nodes go again within minutes, a scale-up gets a cluster with short delays.
watching := $(if $(filter scale-up,$(SCENARIO)),IDLE_MINUTES=$(or $(IDLE_MINUTES),0.2) CONFIG=$(if \
	$(filter file,$(origin CONFIG)),configs/quick-scaling.yaml,$(CONFIG)))

loadtest: runtime ## Load the local cluster (start it if none is up) or URL=: SCENARIO=smoke, ARGS="--rate 2"; reports in HTML
	@$(if $(URL),,$(py) -m loadtest ready $(at) || $(MAKE) CLUSTER=local up deploy $(watching))
	@$(py) -m loadtest run "$(SCENARIO)" $(at) $(if $(URL),--url "$(URL)") $(ARGS)

# Tests without a cluster compute, and those on clusters mostly wait. So they run beside each other, and the former yield.
# What shares a cluster is in one process (tests/scheduling.py). Those over SSH come last: started beside two other
# clusters, Ray's head gives up after a minute. In CI a skip is a failure.
pytest := env -u MAKEFLAGS -u MFLAGS $(py) -m pytest --durations=10 --durations-min=5 $(if $(CI),--no-skips-but "$(EXPECTED_SKIPS)")
by_file := --dist loadfile --no-loadscope-reorder
over_ssh := tests/cluster/test_remote_ssh.py
clusters := -n 2 --dist loadscope tests/on_cluster
elsewhere := not jobs and not scaling and not parity and not faults and not chaos and not browser

test: dev ## Run all tests but those with a target of their own; TESTS="tests/test_x.py -k name" for some
	@$(if $(TESTS),$(pytest) $(TESTS),$(MAKE) --no-print-directory -j2 --output-sync=$(if $(CI),target,line) \
		test-computing test-waiting)

test-computing: dev
	@nice -n 10 $(pytest) -n 3 $(by_file) -m "$(elsewhere) and not cluster" # some wait: three on two cores

test-waiting: dev
	@$(pytest) $(clusters) -m "$(elsewhere) and cluster" && $(pytest) $(over_ssh)

test-quick: dev ## Run the tests that need neither a cluster nor much computing: about a minute, for the inner loop
	@$(pytest) -q -n 4 $(by_file) -m "$(elsewhere) and not cluster and not slow" # a third of it waits: four on two cores

test-jobs: dev ## Run the tests that submit jobs to a local cluster, a small training among them
	@$(pytest) -m jobs tests/on_cluster/test_jobs.py

test-cluster: dev ## Run the tests in which nodes of a local cluster come, go and die
	@$(pytest) -m scaling tests/on_cluster/test_scaling.py

test-faults: dev ## Have parts of a real deployment fail under load, and tell what clients saw and for how long (4 minutes)
	@$(py) -m pytest -m faults tests/on_cluster/test_faults.py -rP

test-chaos: dev ## Kill replicas, nodes, controller and proxy at random under load, for five minutes; SEED=7 draws them again
	@SEED="$(SEED)" $(py) -m pytest -m chaos tests/on_cluster/test_chaos.py -rP

test-browser: browser ## Look at the page in a real headless Chromium: draw, preview, cancel, mask, lose the server, accessibility
	@$(pytest) -m browser tests/browser

page-pictures: browser ## Make the pictures of the page in assets/ anew, of the local cluster with the demo model
	@$(py) -m loadtest ready $(at) || $(MAKE) CLUSTER=local up deploy
	@$(py) -m tests.browser.pictures $(at)

test-http-jobs-faults: dev ## Kill what draws 200 jobs over HTTP ten times, and find 200 pictures, each that of its seed (10 minutes)
	@$(py) -m pytest -m faults tests/on_cluster/test_http_jobs_faults.py -rP

fuzz: dev ## Send COUNT=26000 malformed requests, made from SEED=0, to the local cluster; KIND=uploads for images alone
	@$(py) -m loadtest ready $(at) || $(MAKE) CLUSTER=local up deploy
	@$(py) -m tests.http_fuzz $(at) --count "$(or $(COUNT),26000)" --seed "$(or $(SEED),0)" $(if $(KIND),--kind "$(KIND)")

test-parity: parity ## Run what needs diffusers in PyTorch: golden arrays again, one-file checkpoints (several GB to install)
	@$(py) tests/make_golden.py --check
	@$(py) -m pytest -m parity

check: dev ## Check format, lint, names and types
	@$(py) -m ruff format --check
	@$(py) -m ruff check
	@$(py) tests/check_names.py
	@$(py) -m mypy

# No cluster file here has GPUs, so configs for GPUs are held against none.
for_gpus := $(sort $(wildcard configs/*-gpu.yaml))
for_tpus := serve_config.yaml cluster.yaml $(filter-out $(for_gpus),$(sort $(wildcard configs/*.yaml)))

check-config: runtime ## Lint FILES= (all configs here) against Ray's own models, the app's Args and one another
	@$(verb)config.lint $(or $(FILES),$(for_tpus))
	@$(if $(FILES),,$(verb)config.lint $(for_gpus))

tpu-check: libtpu ## Compile CONFIG= for a TPU that is not there: does it fit, how fast, how dear (TPU=v5litepod-4,... MODEL= DOLLARS=)
	@$(py) -m capacity.check --config "$(CONFIG)" --cluster "$(or $(filter-out local,$(CLUSTER)),cluster.yaml)" --model "$(MODEL)" --tpu "$(TPU)" --dollars "$(DOLLARS)"

tpu-plan: libtpu ## Say which TPU, and how many hosts, serve RATE= pictures a second within SLO= seconds (CONFIG= MODEL= SIZE= TPU=)
	@$(py) -m capacity.plan --config "$(CONFIG)" --model "$(MODEL)" --size "$(SIZE)" --tpu "$(TPU)" --dollars "$(DOLLARS)" --rate "$(RATE)" --slo "$(SLO)"

gke: runtime ## Write a Dockerfile and a RayService for Google Kubernetes Engine into outputs/gke (CONFIG= CLUSTER= IMAGE= TPU=)
	@$(py) -m cluster.gke --config "$(CONFIG)" --cluster "$(or $(filter-out local,$(CLUSTER)),cluster.yaml)" --image "$(IMAGE)" --tpu "$(TPU)"

api-key: runtime ## Make an API key: NAME=alice [FILE=api_keys.yaml] [RPM=60] [CONCURRENT=4]
	@$(verb)api_key --name "$(NAME)" --file "$(or $(FILE),api_keys.yaml)" --rpm "$(RPM)" --concurrent "$(CONCURRENT)"

format: dev ## Rewrite the code in the house format
	@$(py) -m ruff check --fix --select I
	@$(py) -m ruff format

golden: parity ## Make the golden arrays again with diffusers in PyTorch (several GB to install)
	@$(py) tests/make_golden.py

demo-quality: runtime ## Measure how often the demo model draws what was asked for
	@$(py) -m demo.quality

demo-edits: runtime ## Measure how often an edit by the demo model changes a thing's colour and keeps the rest
	@$(py) -m demo.edits

train-demo: dev ## Train the demo model (hours; goes on where it was interrupted)
	@$(py) -m demo.train

train-flow: dev ## Train a small flow model of FLUX.2-klein's form on the demo's pictures, into outputs/demo-flow (hours; goes on too)
	@$(py) -m demo.train_flow

bench-engine: runtime ## Measure the engine against whole batches: latency, slowdown, throughput (about 12 minutes)
	@$(py) -m benchmarks.engine

bench-devices: runtime ## Measure the engine on stand-in devices that dispatch in every way a real one may (about 6 minutes)
	@$(py) -m benchmarks.device_modes

bench-overhead: runtime ## Measure what HTTP and mixed requests cost over the pipeline's own loop
	@$(py) -m benchmarks.overhead

bench-plan: runtime ## Hold the planner's simulation against the engine with the demo model, under three loads
	@$(py) -m benchmarks.planner

bench-cluster: runtime ## Measure the cluster's queue and router against Serve's own, with four paced replicas (about half an hour)
	@$(py) -m benchmarks.cluster

bench-coldstart: dev ## Measure a start with compiled programs at hand against one without
	@$(py) -m benchmarks.coldstart

bench-batch: runtime ## Measure batch generation on the local cluster against the engine alone (about 4 minutes)
	@$(MAKE) CLUSTER=local up
	@$(py) -m benchmarks.batch $(at)
bench-loadgen: runtime ## Measure the load test's own generator: its highest rate, its percentiles, beside wrk where installed
	@$(py) -m benchmarks.loadgen

soak: dev ## Soak a local cluster of its own in mixed load, hang-ups and kills for MINUTES=60; RESUME=folder goes on with one
	@$(py) -m benchmarks.soak --minutes "$(MINUTES)" $(if $(RESUME),--resume "$(RESUME)")

bench-torch: parity ## Measure a guided step on this processor against diffusers in PyTorch (several GB to install)
	@$(py) -m benchmarks.against_torch

bench-gpu: cuda parity ## Measure the GPU of this machine: ours beside diffusers in PyTorch, in under eight minutes
	@$(py) -m benchmarks.on_gpu

# uv resolves for every platform at once, which pip cannot. It has an environment of its own, so that it is in no lock.
uv := .cache/uv-$(UV_VERSION)/bin/uv
lock := $(uv) pip compile pyproject.toml --universal --generate-hashes --no-emit-index-url --no-header \
	--quiet --python-version 3.11

played := $(or $(filter-out local,$(CLUSTER)),cluster.yaml)

rehearse: gcp ## Rehearse CLUSTER=cluster.yaml from up to down against a simulated Google Cloud with hosts, as root (under 20 minutes)
	@$(py) -m rehearsal --hosts whole $(played)

rehearse-faults: gcp ## Rehearse CLUSTER=cluster.yaml the same way, with Google's refusals, delays and losses one after another
	@$(py) -m rehearsal --hosts faults $(played)

rehearse-variants: gcp ## Rehearse configs/cluster-*.yaml the same way, up to the first picture
	@$(py) -m rehearsal --hosts half $(sort $(wildcard configs/cluster-*.yaml))

rehearse-gke: gcp ## Rehearse what `make gke` writes: the image's commands and the pods' in Linux namespaces, as root
	@$(py) -m rehearsal.gke

rehearse-calls: gcp ## Rehearse FILES= (all cluster files) against a simulated Google Cloud, without hosts: 4 to 60 s each
	@$(py) -m rehearsal $(FILES)

lock: ## Pin requirements/*.txt again from pyproject.toml
	@test -x $(uv) || \
		{ $(PYTHON) -m venv .cache/uv-$(UV_VERSION) && $(dir $(uv))pip install -q --disable-pip-version-check uv==$(UV_VERSION); }
	@$(lock) -o requirements/runtime.txt
	@$(lock) -c requirements/runtime.txt --extra tpu -o requirements/tpu.txt
	@$(lock) -c requirements/runtime.txt --extra gcp -o requirements/gcp.txt
	@$(lock) -c requirements/runtime.txt --extra gcs -o requirements/gcs.txt
	@$(lock) -c requirements/runtime.txt --extra dev -o requirements/dev.txt
	@$(lock) -c requirements/runtime.txt --extra dev --extra parity -o requirements/parity.txt
	@$(lock) -c requirements/parity.txt --extra cuda -o requirements/cuda.txt # CUDA's libraries as PyTorch pins them
	@$(lock) -c requirements/dev.txt --extra dev --extra browser -o requirements/browser.txt
	@echo "Pinned requirements/*.txt anew. The next make installs what changed."

clean: ## Remove caches; .venv, outputs/ and what is up stay
	@rm -rf .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find app benchmarks capacity cluster demo jobs loadtest rehearsal tests -name __pycache__ -type d -prune -exec rm -rf {} +

libtpu: runtime
	@$(py) -m capacity.libtpu

# The environments, each by the requirement file of its name.
runtime dev parity gcp cuda browser:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON). Install Python 3.11 or newer, or name another one: make PYTHON=..."; exit 1; }
	@$(PYTHON) cluster/install.py $@ --venv $(VENV) $(named)
