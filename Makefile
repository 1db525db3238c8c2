# Each target builds .venv first, so it works where pip refuses to install outside a virtual environment.
PYTHON ?= python3
PY = .venv/bin/python

quickstart: .venv/core  ## real text, a real GPT, and text that it generated
	test -e data/python || $(PY) prepare.py
	$(PY) train.py config/quickstart.py --resume

test: .venv/extra
	$(PY) -m pytest

.venv/core: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "daygpt needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch $@

.venv/extra: .venv/core requirements-extra.txt
	$(PY) -m pip install -q -r requirements-extra.txt
	touch $@

.PHONY: quickstart test
