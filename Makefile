# make demo and make test are all that a newcomer types; each installs first when needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
REQUIREMENTS := $(VENV)/.requirements
INSTALLED := $(VENV)/.installed
# Two at a time: most tests keep one core busy. `make test WORKERS=0` runs them in one process.
WORKERS ?= 2
SOURCES := CMakeLists.txt pyproject.toml constraints.txt $(shell find csrc -type f -name '*.*')

.PHONY: install demo test test-slow lint format bench sanitize sanitize-address sanitize-thread wheel clean

install: $(INSTALLED)

# The builds of the package need torch's headers and are made without isolation, so what builds it comes first.
$(REQUIREMENTS): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastgan needs Python 3.10 or newer; this is " + sys.version)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.25" "ninja>=1.11"
	@touch $@

# An editable install does not rebuild by itself: this stamp sees changes of the C++ side.
$(INSTALLED): $(REQUIREMENTS) $(SOURCES)
	$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[all,test,lint]"
	@touch $@
	@$(BIN)/fastgan info

demo: $(INSTALLED)
	$(BIN)/fastgan demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')

bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks $(PYTEST_ARGS)

# Side by side: each compiles and runs on one core.
sanitize: $(INSTALLED)
	$(MAKE) --no-print-directory -j 2 --output-sync=target sanitize-address sanitize-thread

sanitize-address sanitize-thread:
	bash tests/kernel_harness/run.sh $(@:sanitize-%=%)

wheel: $(INSTALLED)
	$(PIP) wheel -q --no-build-isolation --no-deps -w dist .

clean:
	rm -rf $(VENV) build dist runs
