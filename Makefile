# Every target sets up .venv first (minutes once, then nothing): see .ci/setup.
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-cluster demo-stop images test test-quick coverage lint docs bench  # bench-% cannot be listed, and no file is called so
python := .venv/bin/python
unexport PYTHONDONTWRITEBYTECODE # where it is set, every task and every test would compile each library again

help: ## Show this list
	@sed -nE 's/^([a-z%-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: ## Make .venv with the pinned versions; every other target does it by itself
	@.ci/setup
	-@$(python) -m compileall -q lepton_airflow # pip compiles no editable install, and every task imports it

demo: setup ## Start Airflow, retrain on real flights month by month, print what happened and where to look
	@$(python) demo/run.py up

demo-cluster: setup ## Retrain in pods of the cluster that KUBECONFIG names, and show them as they run
	@$(python) demo/cluster.py up

demo-stop: setup ## End what make demo and make demo-cluster started
	@$(python) demo/run.py down
	@$(python) demo/cluster.py down

images: ## Build the stages' image with docker or podman; EXTRAS="validate train,s3" builds one for each
	@images/build

pytest := $(python) -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations 15

test: setup ## Run all tests; those on a Kubernetes cluster when KUBECONFIG names one, for which an image is built
	@$(pytest)

test-quick: setup ## Run the tests that need no Airflow, no cluster, no browser and no network: four minutes
	@$(pytest) -m "not airflow and not cluster and not network and not slow"

coverage: setup ## Run all tests, say which lines of the package they do not reach, and fail below the floor
	@$(pytest) --cov --cov-report=term:skip-covered

lint: setup ## Check style, types, the layers of the architecture, shell scripts, Dockerfiles and spelling
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo
	.venv/bin/shellcheck $$(git grep -lE '^#!.*sh$$')
	.venv/bin/hadolint images/*.Dockerfile
	.venv/bin/codespell $$(git ls-files)

docs: setup ## Build the documentation as one site, in site/; it loads nothing from elsewhere
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict # without Material's notice: see mkdocs.yml

bench: setup ## Run every benchmark; each writes its part of docs/benchmarks.md
	@$(python) benchmarks/run.py

bench-%: setup ## Run one benchmark (drift, drills, gpu, parse, pipeline, pods, quantize, serving, store, validate); its last line is one JSON object; some take ARGS="--only peers"
	@$(python) benchmarks/run.py $* $(ARGS)
