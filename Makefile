# make demo | test | check | bench | clean
PYTHON ?= python3
# Extra arguments for installing torch, such as an index with CPU builds.
TORCH_ARGS ?=
DEMO = runs/demo
DEMO_SCENARIO = digits-mlp
DEMO_TIMESTEPS = 200000
DEMO_RULES = constant step exponential cosine warmup-cosine cosine-restarts wsd one-cycle plateau greedy random
DEMO_RUNS = 64
TEST_WORKERS = 2

# What tests compare curvature with. It declares a library that needs torchvision, which CPU builds of torch do not go with.
ORACLES = curvlinops-for-pytorch einops einconv linear-operator opt-einsum unfoldNd

BIN = .venv/bin
STAMP = .venv/.installed

.PHONY: install demo test check bench clean

install: $(STAMP)

# torch first, by itself, so that TORCH_ARGS decides which of its builds the rest is installed against.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt $(TORCH_ARGS) torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev,onnx,plots]"
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps $(ORACLES)
	touch $(STAMP)

# Train a policy, then compare it with the rules on held-out tasks.
demo: $(STAMP)
	rm -rf $(DEMO)
	$(BIN)/trimtab train $(DEMO_SCENARIO) --timesteps $(DEMO_TIMESTEPS) --seed 0 --out $(DEMO)/train
	$(BIN)/trimtab bench --policies $(DEMO)/train/policy $(DEMO_RULES) --scenarios $(DEMO_SCENARIO) \
		--runs $(DEMO_RUNS) --seed 0 --tuned --out $(DEMO)/bench

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_WORKERS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -q tests/test_layout.py -k budget

bench: $(STAMP)
	set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || test $$? = 2; done

clean:
	rm -rf build dist runs/demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage htmlcov
