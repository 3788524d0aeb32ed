# Everything here sets itself up: `.venv` in this checkout, then the package with its dev extras.
# TORCH and PYTHON may be overridden, as in `make test PYTHON=/usr/bin/python3.12`.

TORCH ?= torch==2.13.0
MODEL ?= dstep_motion_d40
BACKEND ?= tvm
CLIP ?= models/clips/move_left.mp4
OUT ?= out

VENV := .venv
BIN := $(VENV)/bin
PEERS := $(VENV)/peers
READY := $(VENV)/.ready
EMULATORS := $(VENV)/.emulators
MINIMUM := $(VENV)/minimum
RUNTIME := $(VENV)/oldest-runtime
# The package as it is installed: mypy follows folders, not the import hooks of an editable install.
TYPED := .mypy_cache/tree/dvexport
FIND_PYTHON := for p in $(PYTHON) python3.11 python3; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; exit 0; fi; \
	done; echo "needs Python 3.11 or newer; name one with PYTHON=..." >&2; exit 1

# Two test processes of one thread each: more threads than that only contend on small machines.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-fast test-minimum bench lint clean

# Where a home can't be written, what this checkout exports is remembered in it.
ifneq ($(shell test -w "$$HOME" && echo yes),yes)
export DVEXPORT_STATE ?= $(CURDIR)/$(VENV)/state
endif

demo: $(READY)
	mkdir -p $(OUT)
	$(BIN)/dvexport export $(MODEL) --target host --backend $(BACKEND) --mode stream --calibrate $(CLIP) -o $(OUT)/$(MODEL).dvx
	$(BIN)/dvexport verify $(OUT)/$(MODEL).dvx --clip $(CLIP)
	$(BIN)/dvexport run $(OUT)/$(MODEL).dvx --clip $(CLIP)
	$(BIN)/dvexport profile $(OUT)/$(MODEL).dvx --clip $(CLIP) --html $(OUT)/report.html --json $(OUT)/profile.json
	@echo "the page: $(abspath $(OUT)/report.html)"

test: lint $(EMULATORS)
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

# With the lowest version of every dependency that pyproject.toml allows, and artifacts in the oldest runtime of the
# catalogue.
test-minimum: $(MINIMUM)/.ready $(RUNTIME)/.ready
	DVEXPORT_OLDEST_RUNTIME=$(RUNTIME)/bin/python $(MINIMUM)/bin/python -m pytest -n 2 --dist worksteal \
		-m 'not slow' tests/bundle tests/cli tests/graph tests/passes tests/profile tests/run tests/video \
		tests/models/test_huggingface.py tests/native/network/test_bundle.py

bench: $(READY) $(PEERS)/.ready
	$(BIN)/python -m benchmarks --peer-python $(PEERS)/bin/python

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf $(TYPED) && mkdir -p $(TYPED)
	@ln -s $(addprefix ../../../,$(wildcard dvexport/[!_]* dvexport/__init__.py models passes targets)) $(TYPED)
	cd $(TYPED)/.. && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../typed

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# torch first and pinned: it is by far the largest part, and what traces depend on.
$(READY): pyproject.toml
	@echo "setting up $(VENV), once: this takes a few minutes"
	@python=$$($(FIND_PYTHON)) && $$python -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar on '$(TORCH)'
	$(BIN)/python -m pip install --quiet --progress-bar on --editable '.[dev,tvm]'
	@touch $@

# For the tests of ARM code, where they may be installed; where not, those tests are skipped and say why.
$(EMULATORS): $(READY)
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		! { command -v qemu-aarch64-static && command -v qemu-aarch64; } >/dev/null; then \
		export DEBIAN_FRONTEND=noninteractive; \
		install() { apt-get install -qq --no-install-recommends $$1 >/dev/null 2>&1; }; \
		for p in qemu-user-static qemu-user; do \
			install $$p || { apt-get update -qq >/dev/null 2>&1 && install $$p; } || true; \
		done; fi
	@touch $@

$(MINIMUM)/.ready: pyproject.toml | $(READY)
	@echo "setting up $(MINIMUM), the lowest versions, once"
	@$(BIN)/python -m venv $(MINIMUM)
	@$(MINIMUM)/bin/python -m pip install --quiet --progress-bar on '$(TORCH)'
	@$(BIN)/python tests/support/lowest.py > $(MINIMUM)/lowest.txt
	@$(MINIMUM)/bin/python -m pip install --quiet --progress-bar on --requirement $(MINIMUM)/lowest.txt
	@$(MINIMUM)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

$(RUNTIME)/.ready: pyproject.toml | $(READY)
	@$(BIN)/python -m venv $(RUNTIME)
	@version=$$($(BIN)/python -c 'from dvexport.targets.onnx.table import oldest_version; print(oldest_version())') && \
	$(RUNTIME)/bin/python -m pip install --quiet --progress-bar on "onnxruntime==$$version" 'numpy<2'
	@touch $@

# Apart, since what they depend on would set back packages of ours. Without them only our own sides are measured.
$(PEERS)/.ready: pyproject.toml | $(READY)
	@echo "setting up $(PEERS), the runtimes to measure against, once: 4 GB"
	@$(BIN)/python -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet --progress-bar on '$(TORCH)' && \
	$(PEERS)/bin/python -m pip install --quiet --progress-bar on --editable '.[bench]' && touch $@ || \
	echo "some of them can't be installed; their rows will say so"
