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
	nvidia-pytriton "tritonclient[http,grpc]" -e ".[cpu]"
BUNDLE := build/pocket
# what an exported bundle depends on: the exporter, the contract and the weights of pocket
EXPORTER := $(wildcard export/*.py export/graphs/*.py export/models/*.py \
	export/pocket/*.safetensors var_deploy/*.py)

.PHONY: demo test lint types wheel train clean
.DELETE_ON_ERROR:

demo: $(BUNDLE)/manifest.json
	$(BIN)/var-deploy verify $(BUNDLE)
	$(BIN)/var-deploy generate $(BUNDLE) --count 40 --seed 1 --out build/demo.png \
		--labels star,heart,house,tree,fish,flower,sun,moon,mushroom,boat
	@echo "the picture: $(CURDIR)/build/demo.png"

$(BUNDLE)/manifest.json: $(EXPORTER) | $(READY)
	$(BIN)/var-deploy export pocket --out $(BUNDLE) --force

# Two processes, each with files of its own: in one it takes nearly twice as long.
test: $(CHECKS) $(TRITON_READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

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

# build/lib keeps files that have since been deleted, and setuptools would pack them
wheel: $(READY)
	rm -rf build/lib build/bdist.*
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

train: $(READY)
	$(BIN)/python -m tools.pocket.train --out build/train

# Builds, compares and times engines on this machine's GPU; without one a rehearsal on the CPU. A
# board without PyTorch runs the same program on a bundle that was copied there: docs/JETSON.md
DEVICE_BUNDLE := build/device/pocket
.PHONY: device-check
device-check: $(DEVICE_BUNDLE)/manifest.json
	$(BIN)/python -m var_deploy.runtime.device_check $(DEVICE_BUNDLE) \
		--out build/device-report.json

$(DEVICE_BUNDLE)/manifest.json: $(EXPORTER) | $(READY)
	$(BIN)/var-deploy export pocket --precision fp32 --precision fp16 \
		--out $(DEVICE_BUNDLE) --force

# the virtual environment stays: .venv is made anew once it is deleted by hand
clean:
	rm -rf build dist .types .mypy_cache .ruff_cache .pytest_cache
	find var_deploy export runtime tests -name __pycache__ -prune -exec rm -rf {} +

# torch first: with pip's settings pointing at PyTorch's CPU builds it is a tenth of the download
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt setuptools torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation \
		-e ".[export,cpu,serve,dev]"
	@touch $@
