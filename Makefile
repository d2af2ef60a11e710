# Every rule sets up what it needs. Python 3.10 or newer; another one: make PYTHON=python3.12 ...
PYTHON ?= python3

BIN := .venv/bin
READY := .venv/.ready
CHECKS := .venv/.checks
INSTALL_CHECKS = $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation \
	-e ".[checks]"
TRITON := .venv/triton
TRITON_READY := $(TRITON)/.ready
INSTALL_TRITON = $(TRITON)/bin/python -m pip install -q -c constraints-triton.txt setuptools && \
	$(TRITON)/bin/python -m pip install -q -c constraints-triton.txt --no-build-isolation \
	nvidia-pytriton "tritonclient[http,grpc]" -e ".[cpu,text]"
BUNDLE := build/pocket
TEXT_BUNDLE := build/pocket-text
PORTABLE := build/portable/pocket
# what an exported bundle depends on: the exporter, the contract and the weights that come with it
EXPORTER := $(wildcard export/*.py export/*/*.py export/pocket*/*.safetensors \
	export/pocket_text/text/* var_deploy/*.py var_deploy/bundle/*.py var_deploy/families/*.py \
	var_deploy/files/*.py)

.PHONY: demo bundle test test-pythons test-arm64 test-gpu test-fast fuzz lint types wheel train \
	train-text clean
.DELETE_ON_ERROR:

demo: $(BUNDLE)/manifest.json
	$(BIN)/var-deploy verify $(BUNDLE)
	@$(BIN)/var-deploy demo --out build

$(BUNDLE)/manifest.json: $(EXPORTER) | $(READY)
	$(BIN)/var-deploy export pocket --out $(BUNDLE) --force

# What `var-deploy demo` writes its bundles from, without PyTorch. It is part of the package and in
# git: to be made again when an export of pocket or pocket-text has other bytes, which a test compares.
bundle: $(BUNDLE)/manifest.json $(TEXT_BUNDLE)/manifest.json
	$(BIN)/python -m var_deploy.export.pack_demo build

$(TEXT_BUNDLE)/manifest.json: $(EXPORTER) | $(READY)
	$(BIN)/var-deploy export pocket-text --out $(TEXT_BUNDLE) --force

# Two processes, each with files of its own: in one it takes nearly twice as long. The order is that
# of tests/conftest.py; xdist would else start the files with few tests last, and those take longest.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
test: $(CHECKS) $(TRITON_READY)
	$(BIN)/python -m pytest $(PARALLEL)

# Needs an NVIDIA GPU, cuda-python and onnxruntime-gpu in the environment; what is missing is named.
# `make test` runs these tests as well, and skips them in the same way.
test-gpu: $(CHECKS)
	$(BIN)/python -m pytest tests/gpu

# What fits into two minutes: all but the files of tests/slow_files.py
test-fast: $(CHECKS)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

# The damaged inputs of tests/fuzz, twenty times as many as in the tests; prints what became of them
fuzz: $(CHECKS)
	VAR_DEPLOY_FUZZ=20 $(BIN)/python -m pytest tests/fuzz -q -s

# TensorRT for RTX and the like: 100 MB, for x86-64 only, and needed by some tests alone. Without
# them those tests say that they were skipped, and the next run tries again.
$(CHECKS): $(READY)
	@$(INSTALL_CHECKS) || $(INSTALL_CHECKS) && touch $@ \
		|| echo "warning: not all packages could be installed; some tests will be skipped"

# NVIDIA's Triton with our runtime: the server comes in a wheel that needs an older NumPy, hence an
# environment of its own. Without it its tests say that they were skipped, as above.
$(TRITON_READY): pyproject.toml constraints-triton.txt | $(READY)
	@test -x $(TRITON)/bin/python || $(PYTHON) -m venv $(TRITON)
	@$(INSTALL_TRITON) && touch $@ \
		|| echo "warning: Triton could not be installed; its tests will be skipped"

lint: $(READY)
	$(BIN)/ruff check .

# Ray's own types are needed, hence all packages
types: $(CHECKS) .types/var_deploy
	$(BIN)/mypy .types/var_deploy .types/tools

# Folders of links, as the package is laid out when installed. Always made anew: it takes no time,
# and a link to a file that has gone would stop mypy.
.PHONY: .types/var_deploy
.types/var_deploy:
	@rm -rf .types && mkdir -p $@
	@ln -s $(CURDIR)/var_deploy/* $(CURDIR)/export $(CURDIR)/runtime $@/
	@ln -s $(CURDIR)/tools .types/tools

# The wheel needs no PyTorch, so it is built in a small environment of its own. build/lib keeps
# files that have since been deleted, and setuptools would pack them.
BUILD := .venv/build
BUILD_READY := $(BUILD)/.ready
WHEELS := dist
wheel: $(BUILD_READY)
	rm -rf build/lib build/bdist.*
	$(BUILD)/bin/python -m build --wheel --no-isolation --outdir $(WHEELS)

$(BUILD_READY): constraints.txt
	test -x $(BUILD)/bin/python || $(PYTHON) -m venv $(BUILD)
	$(BUILD)/bin/python -m pip install -q -c constraints.txt build setuptools
	@touch $@

# one wheel, alone in its folder, for the two targets below
PORTABLE_WHEEL := build/wheel
.PHONY: $(PORTABLE_WHEEL)
$(PORTABLE_WHEEL):
	@rm -rf $@ && mkdir -p $(@D)
	@$(MAKE) --no-print-directory wheel WHEELS=$@ > $@.txt 2>&1 || { cat $@.txt; exit 1; }

# The runtime half of the wheel on Python 3.10, 3.12 and 3.13, with the newest dependencies
test-pythons: $(PORTABLE_WHEEL) $(PORTABLE)/manifest.json
	$(BIN)/python tests/pythons/every_python.py --wheel $(PORTABLE_WHEEL) --bundle $(PORTABLE)

# ... and on 64-bit Arm, under emulation. Without root and apt it says that it was skipped.
test-arm64: $(PORTABLE_WHEEL) $(PORTABLE)/manifest.json
	$(BIN)/python tests/arm64/emulate.py --wheel $(PORTABLE_WHEEL) --bundle $(PORTABLE) \
		--pip $(BUILD)/bin/python

$(PORTABLE)/manifest.json: $(EXPORTER) | $(READY)
	$(BIN)/var-deploy export pocket --precision fp32 --precision fp16 --precision int8 \
		--out $(PORTABLE) --force

train: $(READY)
	$(BIN)/python -m tools.pocket.train --out build/train

# Goes on where it was stopped; see tools/pocket_text/train.py
train-text: $(READY)
	$(BIN)/python -m tools.pocket_text.train --out build/train-text

# Builds, compares and times engines on this machine's GPU; without one a rehearsal on the CPU. A
# board without PyTorch runs the same program on a bundle that was copied there: docs/JETSON.md
DEVICE_BUNDLE := build/device/pocket
.PHONY: device-check
device-check: $(DEVICE_BUNDLE)/manifest.json
	$(BIN)/python -m var_deploy.device_check $(DEVICE_BUNDLE) \
		--out build/device-report.json

$(DEVICE_BUNDLE)/manifest.json: $(EXPORTER) | $(READY)
	$(BIN)/var-deploy export pocket --precision fp32 --precision fp16 \
		--out $(DEVICE_BUNDLE) --force

# the virtual environment stays: .venv is made anew once it is deleted by hand
clean:
	rm -rf build dist .types .mypy_cache .ruff_cache .pytest_cache
	find var_deploy export runtime tests -name __pycache__ -prune -exec rm -rf {} +

# torch first: with pip's settings pointing at PyTorch's CPU builds it is a tenth of the download.
# Most of its modules are never imported, so none is compiled ahead: 15 s of 108 in `make demo`.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt setuptools torch==2.13.0
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt --no-build-isolation \
		-e ".[export,cpu,serve,text,dev]"
	@touch $@
