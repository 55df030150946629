# Every target sets up what it needs: a virtual environment in .venv with the pinned packages of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Releases of ONNX Runtime from the oldest allowed on; `make test` tries three of them.
ONNXRUNTIMES := 1.20.0,1.20.1,1.21.1,1.22.1,1.23.1,1.23.2,1.24.4,1.28.0,1.31.1,installed

.PHONY: demo test test-native test-runtimes lint format bench gpu wheel clean

NATIVE := $(wildcard kernels/cpu/* plugins/common/* plugins/cuda/* plugins/onnxruntime/* plugins/onnxruntime_cuda/*)

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt cli.py $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# Headers and type stubs of TensorRT, to check the plugins with; what they ask for would pull in TensorRT itself.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps kernel-lens tensorrt-stubs
	touch $@

demo: $(STAMP)
	$(BIN)/python -m samples.01_export_and_prove
	$(BIN)/python -m samples.04_trained_models --small

# Two processes, each with whole files: fixtures of a module are made once.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The kernels and ops again, under AddressSanitizer and UBSan; python itself is not built with them, so they are preloaded.
# An allocation that is too large returns null there too, as it does without them.
SANITIZED := build/sanitized
test-native: $(STAMP)
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DUMV2_SANITIZE=ON \
		-DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja
	$(BIN)/cmake --build $(SANITIZED)
	UMV2_KERNEL_LIBRARY=$(SANITIZED)/libumv2_onnxruntime.so ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
		$(BIN)/python -m pytest tests/kernels

test-runtimes: $(STAMP)
	UMV2_ONNXRUNTIMES=$(ONNXRUNTIMES) $(BIN)/python -m pytest tests/runtimes/test_onnxruntime_versions.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m samples.02_export_at_scale
	$(BIN)/umv2-export bench-op
	$(BIN)/python -m samples.03_traffic_at_scale

# What takes a GPU: measures, writes docs/gpu-results.md, and runs the tests that a GPU alone can run in full (kernels,
# launches of the compiled PTX and cubin, the harness of the TensorRT plugin). Without one it ends at once.
gpu: $(STAMP)
	$(BIN)/python -m benchmarks.report
	$(BIN)/python -m pytest -q -rs tests/kernels/test_triton_kernels.py tests/gpu tests/plugins tests/runtimes/test_device.py

wheel: $(STAMP)
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist
