# Every target sets up what it needs in $(VENV) with the tested versions: `make demo` and `make test` work on a fresh
# machine with nothing but Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test test-slow quality style clean
.SECONDARY:

demo: $(VENV)/.demo
	$(RUN) examples/demo.py

test: $(VENV)/.test
	$(RUN) -m pytest tests

test-slow: $(VENV)/.test
	$(RUN) -m pytest tests -m slow

quality: $(VENV)/.quality
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

style: $(VENV)/.quality
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: setup.py constraints.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) outputs
