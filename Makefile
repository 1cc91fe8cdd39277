# Needs Python 3.11 or newer (with its venv module) and make; everything else is installed into .venv.
# Another Python: make PYTHON=python3.12 test

PYTHON ?= python3
BIN := .venv/bin

# The demo: a small BootMAE on the photographs that come with the installed packages, two of them kept for validation; about four minutes on two cores
DEMO_OUT ?= runs/demo
DEMO_FLAGS ?= --arch vit_tiny_patch16_224 --method bootmae --img-size 64 --patch-size 8 --set width=128 depth=4 heads=4 pixel_width=128 \
  --epochs 25 --crops 64 --min-scale 0.9 --valid-pct 0.2 --bs 8 --lr 2e-3 --clip 1 --precision fp32 --seed 42 --overwrite
DEMO_IMAGES ?= photos

# Without byte code every start compiles fastai anew, for some 15 seconds
unexport PYTHONDONTWRITEBYTECODE
# Threads that wait for work spin shortly: where they spin long, small models are several times slower beside other programs
export GOMP_SPINCOUNT ?= 10000

.PHONY: help demo test test-slow lab app screenshots readme clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo       train a small BootMAE on photographs and draw what it learnt (minutes, in $(DEMO_OUT))'
	@echo 'make test       lint, notebooks, tests, and: package and README equal the notebooks'
	@echo 'make test-slow  the tests that train for longer'
	@echo 'make lab        open the notebooks in JupyterLab'
	@echo 'make app        serve the demo in a browser, with the newest run'
	@echo 'make screenshots  pictures of the demo, in nbs/images'
	@echo 'make readme     README.md from nbs/index.ipynb'
	@echo 'make clean      remove caches and built files; keeps .venv, data and runs'

# The stamp file is newer than pyproject.toml once all is installed. uv, not pip: pip may pair torch with a torchvision that does not fit it.
.venv/.ok: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'bootmae_nb needs Python 3.11 or newer, and "$(PYTHON)" is older or absent: name another, e.g. make PYTHON=python3.12 demo'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo 'The venv module of "$(PYTHON)" is absent: install it (on Debian and Ubuntu: apt install python3-venv) and try again'; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check uv
	$(BIN)/uv pip install -q --python $(BIN)/python -e '.[dev]'
	@touch $@

demo: .venv/.ok
	$(BIN)/bootmae-train photos --out $(DEMO_OUT) $(DEMO_FLAGS)
	$(BIN)/bootmae-reconstruct $(DEMO_OUT) $(DEMO_IMAGES) --out $(DEMO_OUT)/pictures
	@echo 'What it learnt: $(DEMO_OUT)/pictures/sheet.png. How it learnt it: $(DEMO_OUT)/reconstructions and $(DEMO_OUT)/losses.png.'
	@echo 'A dozen photographs teach a model these photographs; the ones it never trained on show how little that is of the world.'
	@echo 'Next: your own images (bootmae-train FOLDER), or make lab and the notebook index.ipynb'

# The tests of the demo and of the explorer use a Chromium: one that is there, else Debian's package where packages may be installed, else Playwright's own;
# without any they are skipped, saying so
.venv/.browser: .venv/.ok
	@$(BIN)/python tools/browser.py
	@touch $@

# tests/test_project.py compares the package and README.md with the notebooks
test: .venv/.ok .venv/.browser
	$(BIN)/ruff check bootmae_nb tests tools app
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-slow: .venv/.ok
	$(BIN)/nbdev-test --n-workers 1 --flags slow
	$(BIN)/pytest -m slow || [ $$? -eq 5 ] # 5: no test is marked slow

lab: .venv/.ok
	$(BIN)/jupyter lab nbs

app: .venv/.ok
	$(BIN)/python app/app.py $(APP_FLAGS)

# Of the newest run, or of the model named: make screenshots APP_FLAGS='--checkpoint runs/demo'
screenshots: .venv/.ok
	$(BIN)/python tools/screenshots.py $(APP_FLAGS)

readme: .venv/.ok
	$(BIN)/python tools/readme.py

clean:
	rm -rf build dist _proc _docs *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
