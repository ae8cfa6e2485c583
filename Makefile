# Every target sets itself up. All that a machine needs is Python 3.10 to 3.13 and, for the C++ kernels, a C++ compiler.
#
#   make demo    the main job on a speech clip        make test         lint and every test
#   make bench   the benchmarks; installs other runtimes to compare with, and leaves its report in results/
#   make results            the same, regimes, ragged and corpus, and benchmarks/RESULTS.md and the like from them
#   make test-compat        the tests with transformers 4.57
#   make lint    ruff                                 make clean        remove everything made here
#   make test-kernels   the Triton kernels emulated, with races, bounds and unwritten memory checked (Python 3.12 or 3.13)
#   make test-gpu       the Triton kernels on this machine's GPU
#
# PYTHON=python3.12 chooses the interpreter, ARGS="..." goes to the command that a target runs, WORKERS=n is how many
# tests run at once. pip's own settings apply: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu with torch's
# CPU build saves gigabytes on Linux.

SHELL := /bin/sh
VENV := .venv
COMPAT_VENV := .venv-compat
KERNELS_VENV := .venv-kernels
PYTHON ?=
ARGS ?=
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -gt 4 ] && n=4; echo $$n)
BUILT_FROM := pyproject.toml setup.py MANIFEST.in constraints-common.txt $(wildcard csrc/*)
# Tests run side by side: one thread each keeps them from waiting for each other.
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(1)/bin/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

.PHONY: demo test test-compat test-kernels test-gpu bench results lint clean
.NOTPARALLEL:

demo: $(VENV)/installed
	$(VENV)/bin/wavlm-fast demo $(ARGS)

test: lint
	$(call PYTEST,$(VENV))

test-compat: $(COMPAT_VENV)/installed
	$(call PYTEST,$(COMPAT_VENV))

# ttsem runs kernels for device="cuda" on the CPU, from the compiler's own IR. Where its environment cannot be had, the
# target says why and is no failure. Of pyenv's interpreters only the chosen version is on the PATH.
KERNELS_PYTHONS := $(or $(PYTHON),python3.13 python3.12 $(wildcard $(HOME)/.pyenv/versions/3.1[23].*/bin/python))
test-kernels:
	@leave_out() { echo "test-kernels is left out: $$1"; exit 0; }; \
	if ! cmp -s constraints-kernels.txt $(KERNELS_VENV)/installed; then \
	    for python in $(KERNELS_PYTHONS) ""; do \
	        "$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' \
	            2>/dev/null && break; \
	    done; \
	    [ -n "$$python" ] || leave_out "ttsem needs Python 3.12 or 3.13, none was found"; \
	    [ $$(df -Pk . | awk 'END { print $$4 }') -gt 8000000 ] || leave_out "its environment needs 8 GB of disk"; \
	    echo "Installing into $(KERNELS_VENV) ($$("$$python" -V)): a CUDA build of torch, several GB."; \
	    "$$python" -m venv --clear $(KERNELS_VENV) && \
	    $(KERNELS_VENV)/bin/python -m pip install -q --disable-pip-version-check -r constraints-kernels.txt || \
	        leave_out "its environment could not be installed"; \
	    cp constraints-kernels.txt $(KERNELS_VENV)/installed; \
	fi; \
	PYTHONPATH=. WAVLM_FAST_TEST_DEVICE=ttsem $(call PYTEST,$(KERNELS_VENV)) tests/kernels

test-gpu: $(VENV)/installed
	WAVLM_FAST_TEST_DEVICE=cuda $(VENV)/bin/python -m pytest tests/kernels $(ARGS)

bench: $(VENV)/peers
	mkdir -p results
	$(VENV)/bin/wavlm-fast bench --json results/bench.json --report results $(ARGS)

results: $(VENV)/peers
	$(VENV)/bin/wavlm-fast bench --json benchmarks/results.json $(ARGS)
	$(VENV)/bin/wavlm-fast bench --case regimes --json benchmarks/regimes.json $(ARGS)
	$(VENV)/bin/wavlm-fast bench --case ragged --json benchmarks/ragged.json $(ARGS)
	$(VENV)/bin/wavlm-fast bench --case corpus --json benchmarks/corpus.json $(ARGS)
	$(VENV)/bin/python -m benchmarks.results

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) $(COMPAT_VENV) $(KERNELS_VENV) build dist *.egg-info wavlm_fast/_C*.so wavlm_fast/_build.json
	rm -rf .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/installed: constraints.txt $(BUILT_FROM)
	$(call INSTALL,$(VENV),constraints.txt)

# The extra "bench" by its names: as an extra it would build this package again.
$(VENV)/peers: $(VENV)/installed
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt onnx onnxruntime openvino
	touch $@

$(COMPAT_VENV)/installed: constraints-compat.txt $(BUILT_FROM)
	$(call INSTALL,$(COMPAT_VENV),constraints-compat.txt)

# Interpreters are tried by running them: one that is on the PATH may still not start, or lack venv.
define FIND_PYTHON
	for python in $(if $(PYTHON),"$(PYTHON)",python3.11 python3.12 python3.13 python3.10 python3 python); do \
	    "$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
	        2>/dev/null && break; \
	    python=; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "$(if $(PYTHON),PYTHON=$(PYTHON) is,found) no Python 3.10 to 3.13 that starts and has the venv module."\
	         "Install one (on Debian: python3 and python3-venv) or set PYTHON=/path/to/python3" >&2; \
	    exit 1; \
	fi
endef

# torch first: the extension is built against the torch that is installed, which build isolation would hide.
define INSTALL
	@set -e; \
	if ! $(1)/bin/python -c 'import pip' 2>/dev/null; then $(FIND_PYTHON); "$$python" -m venv --clear $(1); fi; \
	echo "Installing into $(1) ($$($(1)/bin/python -V)); the first time this takes some minutes."; \
	$(1)/bin/python -m pip install -q --disable-pip-version-check -c $(2) torch numpy setuptools wheel ninja; \
	$(1)/bin/python -m pip install -q --disable-pip-version-check -c $(2) --no-build-isolation -e '.[test]'; \
	$(1)/bin/python -c 'import json; r = json.load(open("wavlm_fast/_build.json")); \
	    print("C++ extension:", r.get("failed") and "not built: " + r["failed"] or "built, " + ", ".join(r["levels"]))'; \
	touch $(1)/installed
endef
