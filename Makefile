# `make demo` and `make test` do all of their own set-up, in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# The Python of an environment with CUDA's torch and this package; only the default one is set up here.
GPU_PYTHON ?= $(BIN)/python
# Processes that share the tests, file by file, each on one thread.
TEST_JOBS ?= 2
GPU_INSTALLED := $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(INSTALLED))

.PHONY: kills fuzz interruptions soak demo test lint docs train gpu tune upstream clean

demo: $(INSTALLED)  ## quantize a text-to-image pipeline to INT4 and draw beside fp32: out/demo/
	$(BIN)/python -m examples.emoji.demo

test: $(INSTALLED) lint  ## everything: style, types, tests
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses=$(TEST_JOBS) --dist=loadfile

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p dq_kernels -p dq_runtime

docs: $(INSTALLED)  ## the documents as a site: out/site/
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation --config-settings editable_mode=strict -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

train: $(INSTALLED)  ## train the small UNets again
	$(BIN)/python -m examples.small_unets.train

gpu: $(GPU_INSTALLED)  ## on a GPU: tests and benchmarks in three stages of 5 to 7 minutes (STAGE=check|profile|improve): benchmarks/results/gpu_<device>/
	$(GPU_PYTHON) -m benchmarks.gpu.suite $(if $(STAGE),--stage $(STAGE))

# ARGUMENTS are the scripts' own, such as ARGUMENTS="--minutes 60".
kills: $(INSTALLED)  ## kill saves and calibrations at random moments: nothing is lost or mixed
	PYTHONPATH=tests/support $(BIN)/python tests/robustness/kills.py $(ARGUMENTS)

fuzz: $(INSTALLED)  ## damage checkpoints and calibration sets at random: nothing changes silently
	PYTHONPATH=tests/support $(BIN)/python tests/robustness/fuzz.py $(ARGUMENTS)

interruptions: $(INSTALLED)  ## fail calls at random lines: the model is as it was
	PYTHONPATH=tests/support $(BIN)/python tests/robustness/interruptions.py $(ARGUMENTS)

soak: $(INSTALLED)  ## many calls, loads and threads: no wrong result, no growth of memory
	PYTHONPATH=tests/support $(BIN)/python tests/robustness/soak.py $(ARGUMENTS)

tune: $(GPU_INSTALLED)  ## on a GPU: search launch configurations: kernels/triton/tuning/<architecture>.json
	$(GPU_PYTHON) -m benchmarks.tuning.tune

upstream: $(INSTALLED)  ## diffusers' own tests with our UNets, DIFFUSERS=<checkout>: benchmarks/results/upstream.json
	$(BIN)/pip install --quiet -r benchmarks/upstream/requirements.txt
	$(BIN)/python -m benchmarks.upstream.run --diffusers $(DIFFUSERS)

# CPU wheels are enough for `make demo` and `make test`; on a GPU machine install the package into an environment with CUDA's torch.
$(INSTALLED): setup.py pyproject.toml constraints.txt $(wildcard kernels/*.py kernels/*/*.py kernels/triton/tuning/*.json kernels/cpu/*.cpp dq_runtime/*.py dq_runtime/*/*.py)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt setuptools torch
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation --config-settings editable_mode=strict -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build out *.egg-info
