# make run · make test · make up · make down · make lint. Each line is a command a person could type.
VENV ?= .venv
PYTHON ?= python3
export PATH := $(abspath $(VENV))/bin:$(PATH)
# Not one that happens to be active: uv would install there.
export VIRTUAL_ENV := $(abspath $(VENV))
export DO_NOT_TRACK = 1
export HF_HUB_OFFLINE ?= 1
export MPLBACKEND = Agg

.PHONY: run test test-long up down lint clean
run: $(VENV)/.installed ## data, training, evaluation, report
	@python -m flows # not `dvc repro --pull`: it takes uncached outputs that are missing for done

test: $(VENV)/.installed ## the tests
	@dvc pull --quiet ingest group split base pretrain
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

up: $(VENV)/.installed ## Prefect's server and worker and MLflow, on loopback
	@python -m flows.services up

down: ## stops them
	@python -m flows.services down

test-long: $(VENV)/.installed ## servers and a deployment run through them, exported graphs
	@dvc pull --quiet ingest group split base pretrain
	OMP_NUM_THREADS=1 python -m pytest -m long

lint: $(VENV)/.installed
	ruff check && ruff format --check && mypy

# uv when it can be had (seconds), pip otherwise (minutes)
$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@if python -m pip install --quiet uv; then \
	  UV_FIND_LINKS="$${PIP_FIND_LINKS:-}" uv pip install --quiet -r requirements.lock && uv pip install --quiet --no-deps -e .; \
	else \
	  python -m pip install --quiet -r requirements.lock && python -m pip install --quiet --no-deps -e .; \
	fi
	@touch $@

clean: ## the environment, saved states of trainings, graphs and images in out/; after what `make up` started
	@if [ -e .work/services.json ]; then python -m flows.services down; fi
	rm -rf $(VENV) .work out
