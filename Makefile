# What a person types. `make demo` and `make test` need nothing done first.

PYTHON ?= python3
SERVE ?= 1
PORT ?= 8000
BIN := .venv/bin
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Where npm is missing, the demo's downloads use the one inside this wheel.
comma := ,
NPM := $(if $(shell command -v npm),,$(comma)npm)

DATA := data/emoji
RUN := runs/demo

.PHONY: demo install install-dev test check format serve bench-loss bench-plan bench-data bench-doctor bench-train bench-serve bench-search bench-durability bench-evaluate bench-objectives clean browser help
.DEFAULT_GOAL := help

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: $(RUN)/index/.complete ## data, training, evaluation, bundle, index and the page, on a CPU (SERVE=0: do not serve)
	@if [ "$(SERVE)" = 1 ]; then $(BIN)/vlm serve $(RUN)/bundle --index $(RUN)/index --port $(PORT); \
	else echo "ready: make serve opens http://127.0.0.1:$(PORT)"; fi

install: .venv/.installed ## the environment alone, in .venv

install-dev: .venv/.installed-dev ## the environment with the tools for tests and checks

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "installing pinned dependencies into .venv (about a minute, more where torch brings CUDA)"
	@$(PIP) -e '.[serve$(NPM)]'
	@touch $@

.venv/.installed-dev: .venv/.installed
	@echo "installing the tools for tests and checks"
	@$(PIP) -e '.[serve,milvus,openvino,deepspeed,huggingface,dev,npm]'
	@touch $@

$(DATA)/fetched.json: | .venv/.installed
	$(BIN)/vlm data fetch emoji --folder $(DATA)

$(RUN)/bundle/bundle.json: $(DATA)/fetched.json
	$(BIN)/vlm train configs/train/demo.yaml --resume
	$(BIN)/vlm evaluate $(RUN) --config configs/evaluate/emoji.yaml
	$(BIN)/vlm export $(RUN)

$(RUN)/index/.complete: $(RUN)/bundle/bundle.json
	$(BIN)/vlm index $(DATA)/shards/* --bundle $(RUN)/bundle --index $(RUN)/index
	@touch $@

serve: $(RUN)/index/.complete ## the page and the API of the demo at http://127.0.0.1:8000
	$(BIN)/vlm serve $(RUN)/bundle --index $(RUN)/index --port $(PORT)

# One process a core, each with one thread: files are dealt out whole, so that a server or a trained
# model is made once for the tests that share it.
test: .venv/.installed-dev browser build/kinds ## the whole test suite, with coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --cov --cov-report=term:skip-covered

check: .venv/.installed-dev ## format, lint, types, and the floors of the house
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.installed-dev ## rewrite the files as `make check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-loss: .venv/.installed-dev ## our losses against open_clip's: time and peak memory, as JSON and a table; PART="--batches 4096" for one part
	@mkdir -p build
	$(BIN)/python -m tests.bench.bench_loss --out build/bench-loss.json $(PART)
	@$(BIN)/python -m tests.bench.bench_loss --out build/bench-loss.json --table

bench-plan: .venv/.installed-dev ## the order of 10 billion samples on one of 4,096 ranks, as JSON
	@$(BIN)/python -m tests.bench.bench_plan

bench-data: .venv/.installed-dev ## shards to batches against open_clip's pipeline, as JSON
	@test -d build/photos || $(PIP) --no-deps --target build/photos scikit-image scikit-learn
	@$(BIN)/python -m tests.bench.bench_data --photos build/photos --out build/bench-data.json

bench-doctor: .venv/.installed-dev ## the doctor's forecast of memory against what training takes, as JSON
	@mkdir -p build
	@$(BIN)/python -m tests.bench.bench_doctor --out build/bench-doctor.json

bench-train: .venv/.installed-dev ## our training against open_clip's: samples/s and peak memory, as JSON
	@mkdir -p build
	@$(BIN)/python -m tests.bench.bench_train --out build/bench-train.json

bench-search: .venv/.installed-dev ## recall, latency and cost of search against FAISS-HNSW, as JSON
	@test -d build/faiss || $(PIP) --no-deps --target build/faiss faiss-cpu
	@OMP_NUM_THREADS=2 $(BIN)/python -m tests.bench.bench_search --out build/bench-search.json

bench-durability: .venv/.installed-dev ## kill the writer of a collection 100 times; search while 10,000 items are written
	@$(BIN)/python -m tests.serving.durability 100
	@$(BIN)/python -m tests.serving.durability 100 milvus
	@$(BIN)/python -m tests.serving.writing 10000

# infinity-emb wants older libraries, so it has an environment of its own. Some ten minutes in all.
# INFINITY=PYTHON names an environment where tests/bench/infinity.txt is installed.
bench-serve: .venv/.installed-dev ## our server against a plain one, same weights and client, as JSON
	@mkdir -p build
	@OMP_NUM_THREADS=2 $(BIN)/python -m tests.bench.bench_serve --out build/bench-serve.json $(if $(INFINITY),--infinity $(INFINITY))

bench-evaluate: .venv/.installed-dev ## retrieval of 100,000 among 100,000, exact, both ways: time and peak memory, as JSON
	@mkdir -p build
	@$(BIN)/python -m tests.bench.bench_evaluate --out build/bench-evaluate.json

# 16 objectives, three seeds: some two hours on two quiet cores; stopped, it goes on where it was.
bench-objectives: $(RUN)/bundle/bundle.json .venv/.installed-dev ## every objective on the demo's data at equal samples, as JSON and a table
	@$(BIN)/python -m tests.bench.bench_objectives --out build/bench-objectives.json --set image.size=32 epochs=5
	@$(BIN)/python -m tests.bench.bench_objectives --out build/bench-objectives.json --table

# Models of other projects' kinds for Kubernetes: the tests of k8s/ read them and never import them.
build/kinds: | .venv/.installed-dev
	@$(PIP) --no-deps --no-compile --target $@ kserve==0.21.0 cloudcoil-models-prometheus-operator==0.80.1.0

# The page is tested in a real Chromium. Without one, and without the right to install it, those
# tests say so and are skipped.
browser:
	@if ! command -v chromium >/dev/null 2>&1 && ! command -v google-chrome >/dev/null 2>&1; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
			echo "installing chromium for the tests of the page"; \
			{ apt-get update && apt-get install -y --no-install-recommends chromium; } >/dev/null 2>&1 \
				|| echo "chromium could not be installed; the tests of the page will be skipped"; \
		else echo "no chromium here; the tests of the page will be skipped"; fi; fi

clean: ## remove the environment, the data and the runs
	rm -rf .venv data runs build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
