# Every target sets up what it needs in .venv; nothing is installed anywhere else.
# torch's CPU wheel exists for one Python per machine at most, so PYTHON may need to name it: make test PYTHON=python3.11

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt
CORE := $(VENV)/core.stamp
DEMO := $(VENV)/demo.stamp
DEV := $(VENV)/dev.stamp
SITE := build/site
# What benchmarks are made of, as opposed to benchmarks.
TOOLS := $(addprefix benchmarks/, harness.py selfcheck.py make_table.py gpu.py plot_cpu.py bench_registers.py _%)
# What of the generated code runs under the sanitizers inside Python.
SANITIZED := $(addprefix tests/codegen/test_, vectors.py random_cpu.py cpp.py cpp_values.py examples_cpu.py)
BENCHMARKS := $(filter-out $(TOOLS), $(sort $(wildcard benchmarks/*.py)))

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-pythons opinfo sanitize lint format check bench clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO)  ## explain and run real cascades; tune a kernel for 20 s, compile a small Llama, time it against eager
	@$(PY) examples/demo.py

test: $(DEV)  ## run the tests
	$(PY) -m pytest -q -n 2 -m "not slow and not nightly and not timing"
	$(PY) -m pytest -q -m "timing and not slow and not nightly"

test-all: $(DEV)  ## run every test, the slow ones too
	$(PY) -m pytest -q -n 2 -m "not timing"
	$(PY) -m pytest -q -m timing

test-pythons: $(DEV)  ## run the tests of ir and passes on every supported Python found
	$(PY) tests/pythons.py

opinfo: $(DEV)  ## every operator of PyTorch's own tests, through torch.compile with castile (half an hour)
	$(PY) tests/frontend/opinfo.py

sanitize: $(DEV)  ## the generated C++ under AddressSanitizer and UBSan, for this CPU and for AVX2 (some minutes)
	$(PY) -m pytest -q -m "slow or not slow" tests/codegen/test_sanitized.py
	@set -e; for march in native $(if $(filter x86_64,$(shell uname -m)),haswell); do echo "== -march=$$march"; \
	CASTILE_CXXFLAGS="-march=$$march -O1 -fsanitize=address,undefined -fno-sanitize-recover=all" \
	ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	$(PY) -m pytest -q -m "slow or not slow" -k "not many and not every and not avx2" $(SANITIZED); done

lint: $(DEV) $(SITE)/castile  ## ruff, and mypy strict over the package
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	MYPYPATH=$(SITE) $(PY) -m mypy -p castile

format: $(DEV)  ## let ruff rewrite what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

check:  ## lint, then test
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory test

bench: $(DEV)  ## run every benchmark; ARGS goes to each: make bench ARGS=--quick
	@test -n "$(BENCHMARKS)" || echo "there is no benchmark yet; make bench runs each of benchmarks/*.py"
	@set -e; for file in $(BENCHMARKS); do echo "== $$file"; $(PY) $$file $(ARGS); done

clean:  ## remove everything that these targets made, .venv too
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	$(PYTHON) -m venv $(VENV)

# The build tools come first, at the pinned versions, so that nothing is fetched to build castile itself.
$(CORE): pyproject.toml constraints.txt | $(PY)
	@echo "setting up $(VENV): castile"
	@$(PIP) setuptools wheel
	@$(PIP) --no-build-isolation -e .
	@touch $@

$(DEMO): $(CORE)
	@echo "setting up $(VENV): torch and xgboost (a few minutes the first time)"
	@$(PIP) --no-build-isolation -e '.[torch,tune]'
	@touch $@

# ray is left out: no test needs it, and it is as large as the rest of the tools together.
$(DEV): $(CORE)
	@echo "setting up $(VENV): torch, triton, xgboost and the test tools (some 2.5 GB; a few minutes the first time)"
	@$(PIP) --no-build-isolation -e '.[torch,triton,tune,dev]'
	@touch $@

# The repository is the package; type checks see it under its name through this link.
$(SITE)/castile:
	@mkdir -p $(SITE)
	@ln -sfn ../.. $@
