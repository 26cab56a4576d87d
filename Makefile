# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SEED ?= 0
# One more than there are cores, as tests wait for processes now and then; at most 8.
WORKERS ?= $(shell cores=$$(nproc); echo $$((cores < 8 ? cores + 1 : 8)))
# Threads that wait without spinning: small models stay fast on a machine that does other things too.
export OMP_WAIT_POLICY ?= passive
# Bytecode is kept, or each of the tests' many processes would compile everything again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-seeds study study-control study-errors bench test test-heavy test-cuda torture lint format check clean

demo: $(VENV)/.installed  ## the main job end to end on drawn scenes and embedded models
	$(BIN)/python tools/demo.py --seed $(SEED)

demo-seeds: $(VENV)/.installed  ## the demo for three seeds
	for seed in 0 1 2; do $(BIN)/python tools/demo.py --seed $$seed --output checkpoints/demo-$$seed || exit 1; done

study: $(VENV)/.installed  ## seven arms, three seeds, on drawn scenes and embedded models: 20 minutes on two cores
	$(BIN)/python tools/draw_scenes.py --output checkpoints/study-scenes
	OMP_NUM_THREADS=1 $(BIN)/python tools/study.py --config configs/demo_study.json --annotations checkpoints/study-scenes \
		--image_folder checkpoints/study-scenes/images --cache checkpoints/study-cache --output checkpoints/study --processes 2

study-control: $(VENV)/.installed  ## a study that has an effect to find, on hard scenes: half an hour on two cores
	$(BIN)/python tools/draw_scenes.py --hard --output checkpoints/control-scenes
	$(BIN)/python tools/make_control_vae.py --output checkpoints/control-vae
	OMP_NUM_THREADS=1 $(BIN)/python tools/study.py --config configs/control_study.json --annotations checkpoints/control-scenes \
		--image_folder checkpoints/control-scenes/images --cosmos_model_name checkpoints/control-vae \
		--cache checkpoints/control-cache --output checkpoints/study-control --processes 2

bench: $(VENV)/.installed  ## how fast each phase is here, at small shapes, beside what one would otherwise run
	$(BIN)/python tools/bench.py --shapes small --variants "batch 8 x 2" checkpointing

study-errors: $(VENV)/.installed  ## how often a study is wrong, simulated: a quarter of an hour on one core
	$(BIN)/python tools/study_errors.py

test: $(VENV)/.installed  ## the tests, without the heavy ones
	$(BIN)/python -m pytest -m "not heavy" -n $(WORKERS) --dist worksteal

test-heavy: $(VENV)/.installed  ## the tests that take minutes
	$(BIN)/python -m pytest -m heavy

test-cuda: $(VENV)/.installed  ## what only a GPU does, in three minutes
	$(BIN)/python -m pytest -n 4 tests/models/test_cuda.py

torture: $(VENV)/.installed  ## every promise about faults at full counts, and one table: under half an hour on two cores
	$(BIN)/python -m pytest --torture -p no:cacheprovider

lint: $(VENV)/.installed  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed  ## rewrite files in the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: lint test  ## what CI runs before the demo

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"Python {v} is too old: TheWorld needs 3.11 or newer; name one with make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:  ## remove the virtual environment and tool caches; results stay
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache
