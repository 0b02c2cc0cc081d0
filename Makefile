# make demo: train, adapt, sample and score on two CPU cores, into output/demo.   make test: the whole suite.
# make docs: README and docs/ as a site, output/site/index.html, every link checked.
# make lowest, make newest: the suite with the oldest and the newest packages that pyproject.toml allows, in .venv-lowest and
# .venv-newest (5 GB each). make avx2: the suite with the kernels of a processor without AVX-512.
# make audit: ask the network for known vulnerabilities of what is installed.
# make fuzz: 10,000 damaged files (FILES=100: fewer) for every reader of files from strangers, an estimated 90 minutes of a core.
# Each sets up .venv by itself on its first call. PYTHON=python3.12 chooses another interpreter (3.10 to 3.13).
PYTHON ?= python3
NEWEST_PYTHON ?= 3.13
FILES ?= 10000
BIN := .venv/bin

.PHONY: demo test lint docs lowest newest avx2 audit fuzz clean

demo: .venv/.installed
	$(BIN)/python training/image/demo.py

test: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: .venv/.installed-docs
	$(BIN)/python -m mkdocs build

# uv, because pip cannot resolve to the oldest; the oldest Python with them, as the newest packages may have left it
lowest: .venv/.installed-uv
	$(BIN)/uv venv --clear --python 3.10 .venv-lowest
	$(BIN)/uv pip install --python .venv-lowest --resolution lowest-direct -e '.[test]'
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n auto

newest: .venv/.installed-uv
	$(BIN)/uv venv --clear --python $(NEWEST_PYTHON) .venv-newest
	$(BIN)/uv pip install --python .venv-newest --upgrade -e '.[test]'
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n auto

# what rounds alike with one processor's kernels may not with another's
avx2: .venv/.installed-test
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n auto

audit: .venv/.installed-test
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --local --skip-editable

fuzz: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz_readers.py --files $(FILES)

.venv/.installed-uv: .venv/.installed
	$(BIN)/python -m pip install --quiet uv
	@touch $@

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 14), f"Python 3.10 to 3.13 is needed, not {sys.version}: make PYTHON=python3.12"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

.venv/.installed-docs: .venv/.installed
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	@touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/python -m pip install --quiet -e '.[test]'
	@touch $@

clean:
	rm -rf .venv .venv-lowest .venv-newest output/demo output/site
