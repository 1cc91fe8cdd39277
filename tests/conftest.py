"""What all tests share: a sensible number of threads, the data beside the checkout, skips that say why, scenes, console commands."""
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch

root = Path(__file__).parents[1]
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler) # as in a terminal, when run in the background
torch.set_num_threads(1) # small tensors: more threads only wait for each other, and for minutes where the cores are busy


slow_files = ['test_cli', 'test_resume', 'test_distributed', 'test_explore', 'test_learner', 'test_app', 'test_bench', 'test_study', 'test_finetune', 'test_scorecard']


def pytest_collection_modifyitems(items):
    "Begin with the files that take longest, so that none is left alone at the end; skip tests marked `cuda` where there is no such device."
    items.sort(key=lambda o: slow_files.index(o.path.stem) if o.path.stem in slow_files else len(slow_files))
    if torch.cuda.is_available(): return
    skip = pytest.mark.skip(reason='needs a CUDA device, and PyTorch sees none here')
    for item in items:
        if 'cuda' in item.keywords: item.add_marker(skip)


@pytest.fixture(scope='session')
def shared():
    "The folder of reference tensors and data sets beside the checkout; it need not be there."
    return root.parent/'shared'


def _folder_or_skip(path):
    if not path.is_dir(): pytest.skip(f'needs {path.name} in ../shared beside the checkout, which is not there')
    return path


@pytest.fixture(scope='session')
def reference(shared):
    "Tensors recorded from the authors' code, or a skip."
    return _folder_or_skip(shared/'reference')


@pytest.fixture(scope='session')
def data(shared):
    "Packed data sets, or a skip."
    return _folder_or_skip(shared/'data')


@pytest.fixture(scope='session')
def scenes(tmp_path_factory):
    "Six scenes to train on and four to validate with, in the usual layout; read them only"
    from bootmae_nb.scenes import write_scenes
    return write_scenes(tmp_path_factory.mktemp('scenes'), 6, 4, size=(48, 64), side=(16, 30))


@pytest.fixture
def files(scenes):
    "Folder of the training scenes, and their annotations"
    return scenes/'train'/'images', scenes/'annotations'/'instances_train.json'


@pytest.fixture
def console(capsys, monkeypatch):
    "A console script in this process, which spares the seconds of a start: its name and arguments -> its status, and what it printed"
    monkeypatch.setenv('BOOTMAE_DEVICE', 'cpu')
    def run(name, *args):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, args)])
        status = 0
        try: runpy.run_path(str(Path(sys.executable).parent/name), run_name='__main__')
        except SystemExit as e: status = e.code or 0
        return status, *capsys.readouterr()
    return run
