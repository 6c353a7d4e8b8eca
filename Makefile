# make quickstart: a real model learns a real task, is merged and proven. make test: everything that needs no network.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
BASE := data/bases/smollm2-135m-instruct

.PHONY: quickstart test coverage setup base tiny-base lint types docs-check capabilities test-real test-gpu test-kill test-recipes rehearsal-14b bench bench-gpu bench-scaling bench-forms bench-loss bench-data bench-merge bench-plan notebooks site pictures clean

quickstart: base
	@began=$$(date +%s) && \
	$(RUN)/finetune train recipes/quickstart.yaml && \
	$(RUN)/finetune merge runs/quickstart --out runs/quickstart/merged && \
	$(RUN)/finetune summary runs/quickstart $$began

# A worker for each core, four at most: memory counts too.
test: setup
	$(RUN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile

# The same, with the share of the package's lines that it runs; fails below 90 %. Takes half as much time again.
coverage: setup
	$(RUN)/python -m pytest --cov --cov-report=term -q

setup: $(VENV)/installed

# requirements.lock pins the tested set; which torch build (CPU or CUDA) stays the machine's choice.
$(VENV)/installed: pyproject.toml requirements.lock
	@test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing (a few minutes the first time)"
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c requirements.lock
	@touch $@

base: setup
	@$(RUN)/python data/fetch_base.py

tiny-base: setup
	@$(RUN)/python data/make_tiny_base.py

lint: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: setup
	$(RUN)/mypy

docs-check: setup
	$(RUN)/python -m pytest -q tests/test_docs.py tests/test_house.py tests/recipe/test_recipe.py

# Every PEFT method on every form of base, written to docs/capabilities.md and to what `finetune plan` refuses. Goes on
# where it was interrupted; a few minutes on two idle cores.
capabilities: setup
	$(RUN)/python benchmarks/capabilities.py

# The quickstart's own promises, on the fetched base.
test-real: base
	$(RUN)/python -m pytest -q -m real

# Needs a CUDA card; says so where there is none.
test-gpu: setup
	$(RUN)/python -m pytest -q -m gpu

# Every file operation and random moments of a run: kill, cut off, fill the disk; then the same command goes on.
test-kill: setup
	$(RUN)/python -m pytest -q -m long tests/test_kill.py tests/test_ship_kill.py tests/test_launch.py --timeout=7200 -s

test-recipes: setup
	$(RUN)/python -m pytest -q -m long tests/recipe --timeout=1800 -s

# Qwen-14B's true widths in the original format, random numbers: at its whole depth on a card, at depth 2 elsewhere.
rehearsal-14b: setup
	$(RUN)/python benchmarks/rehearsal_14b.py all runs/rehearsal-14b

# The documentation as a site, API page included, every link checked: runs/site/index.html.
site: setup
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]" -c requirements.lock
	$(RUN)/python -m mkdocs build --strict --config-file docs/site/mkdocs.yml

# Executes the notebooks and writes their .ipynb with fresh outputs.
notebooks: setup
	$(RUN)/python notebooks/make.py

# The peers that benchmarks/ measures against, in an environment of their own with the same versions of what is shared.
.venv-bench/installed: pyproject.toml requirements.lock
	@test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	@.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers.txt -c requirements.lock
	@touch $@

# BENCH_STEPS=2 for a short one. On a machine that does nothing else.
bench: base .venv-bench/installed
	$(RUN)/python benchmarks/train.py

# The loss of every case against the padded, unpacked reference.
bench-loss: base .venv-bench/installed
	$(RUN)/python benchmarks/train.py --loss

# On any CUDA card; says so where there is none. TRL and Liger are measured where they are installed beside it.
bench-gpu: setup
	$(RUN)/python benchmarks/gpu.py

# Cost over 2 to 32 times the work, and its picture.
bench-scaling: base
	$(RUN)/python benchmarks/scaling.py

bench-forms: base
	$(RUN)/python benchmarks/forms.py

bench-data: base
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -e ".[bench]" -c requirements.lock
	$(RUN)/python benchmarks/data.py

bench-merge: setup
	$(RUN)/python benchmarks/merge.py

# What `finetune plan` predicts against what then comes; tests hold the formulas to the record that it writes.
bench-plan: base tiny-base
	$(RUN)/python benchmarks/plan.py

# The README's pictures of pages, in Debian's Chromium: make pictures RUNS="runs/quickstart runs/gentle", both tracked by trackio.
pictures: setup
	$(RUN)/python docs/pictures.py $(RUNS)

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
