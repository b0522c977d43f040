# make quickstart   from nothing to a converted model that talks (CPU, no Hub, no account)
# make test         the tests
# make check        style and types
# make notebooks    the notebooks, on the sample model; what they show is kept in them (half an hour)
PYTHON ?= python3
VENV ?= .venv
# The version that the tests run with. Another one: make TORCH='torch --index-url https://download.pytorch.org/whl/cpu'
TORCH ?= torch==2.13.0
MODEL := sample:smollm2-135m
OUT := out/smollm2-135m-ternary
RUN := $(VENV)/bin/ternarize
NATIVE := $(wildcard ternarize/kernels/CMakeLists.txt ternarize/kernels/csrc/*)

.PHONY: quickstart test check notebooks clean
.DELETE_ON_ERROR:

quickstart: $(OUT)/report.json
	$(RUN) evaluate $(OUT) --teacher $(MODEL) --windows 8 --length 1024
	@echo
	$(RUN) generate $(OUT) "The sky is blue because" --tokens 40 --temperature 0.7

$(OUT)/report.json: | $(VENV)/.installed
	$(RUN) convert $(MODEL) --output $(OUT) --recipe fast --resume

test: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

check: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

notebooks: $(VENV)/.installed-dev
	$(VENV)/bin/python notebooks/run.py

$(VENV)/.installed: pyproject.toml $(NATIVE)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(TORCH)
	$(VENV)/bin/pip install --quiet --editable '.[gguf,plot]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(NATIVE) | $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
