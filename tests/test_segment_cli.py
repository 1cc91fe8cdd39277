"""bootmae-segment: what its three subcommands print and write, how a run goes on, and what is said in a sentence and status 2."""
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from PIL import Image

from bootmae_nb.checkpoints import save_model
from bootmae_nb.models import mim_model
from bootmae_nb.runs import RunState
from bootmae_nb.scenes import write_scenes
from bootmae_nb.segment import load_segmenter

tiny = dict(arch='vit_tiny_patch16_224', img_size=32, patch_size=4, width=32, depth=2, heads=2, pixel_width=16)
start = [sys.executable, '-c', 'import sys; sys.argv[0] = "bootmae-segment"; from bootmae_nb.segment_cli import bootmae_segment; bootmae_segment()']


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with data and an encoder"
    root = tmp_path_factory.mktemp('segment')
    write_scenes(root/'data', 8, 3, size=(32, 48), digits=(0, 1), side=(14, 24))
    save_model(mim_model('bootmae', seed=0, **tiny), root/'encoder')
    return root


@pytest.fixture
def command(console, home, monkeypatch):
    monkeypatch.chdir(home)
    return partial(console, 'bootmae-segment')


small = ['encoder.safetensors', 'data', '--crop', '32x48', '--bs', 4, '--workers', 0, '--set', 'channels=16', 'drop_path=0.', '--seed', 1]


@pytest.fixture
def trained(command, home):
    if not (home/'run').exists():
        status,out,err = command('train', *small, '--epochs', 3, '--lr', '3e-3', '--out', 'run')
        assert status == 0, err
        (home/'said').write_text(out)
    return (home/'said').read_text()


def test_a_run_and_its_files(trained, home):
    assert all(o in trained for o in ('UPerNet on encoder.safetensors', '3 classes', 'miou', 'mIoU'))
    assert all(o in trained for o in ('8 training images, crops of 32 x 48 px in batches of 4', '3 validation images'))
    assert sorted(o.name for o in (home/'run').iterdir()) == [
        'best.json', 'best.safetensors', 'history.csv', 'model.json', 'model.safetensors', 'results.png', 'run.json', 'segmentation.json', 'state']
    assert (home/'run'/'history.csv').read_text().splitlines()[0] == 'epoch,train_loss,valid_loss,miou,accuracy,class_accuracy'
    about = json.loads((home/'run'/'model.json').read_text())
    assert about['config']['task']['kind'] == 'segment' and about['training']['crop'] == '32x48'
    best = json.loads((home/'run'/'best.json').read_text())['best']
    assert best['column'] == 'miou' and best['value'] == max(float(o.split(',')[3]) for o in (home/'run'/'history.csv').read_text().splitlines()[1:])
    assert load_segmenter(home/'run').vocab == ['background', 'digit 0', 'digit 1']


def test_evaluate(trained, command, home):
    status,out,err = command('evaluate', 'run', 'data', '--out', 'a.json')
    assert status == 0 and 'digit 0' in out and 'mIoU' in out, err
    a = json.loads((home/'a.json').read_text())
    best = json.loads((home/'run'/'best.json').read_text())['best']['value']
    assert a['miou'] == pytest.approx(best, abs=1e-6) and a['images'] == 3 and a['about']['part'] == 'valid'
    several = ['--scales', '0.5,1', '--flip', '--side', '48'], dict(scales=[.5, 1], flip=True, side=48)
    for more,about in (['--sliding', '--stride', '16'], dict(window=[32, 48], stride=16)), several:
        assert command('evaluate', 'run', 'data', '--out', 'b.json', '--part', 'train', *more)[0] == 0
        b = json.loads((home/'b.json').read_text())
        assert b['images'] == 8 and about.items() <= b['about'].items()


def test_predict(trained, command, home):
    Image.fromarray(np.zeros((50, 70, 3), np.uint8)).save(home/'other.jpg')
    status,out,err = command('predict', 'run', 'data/valid/images', 'other.jpg', '--out', 'pictures')
    assert status == 0, err
    names = ['0000', '0001', '0002', 'other']
    assert sorted(o.name for o in (home/'pictures').iterdir()) == sorted([*(f'{o}.png' for o in names), *(f'{o}_overlay.png' for o in names), 'legend.png'])
    y,over = Image.open(home/'pictures'/'other.png'), Image.open(home/'pictures'/'other_overlay.png')
    assert y.mode == 'P' and set(np.unique(np.asarray(y))) <= {0, 1, 2} and y.size == over.size == (70, 50)
    assert y.getpalette()[:3] == load_segmenter(home/'run').palette[0].tolist()


def test_numbers_of_the_data_are_written(command, home):
    status,_,err = command('train', *small, '--epochs', 1, '--out', 'shifted', '--ignore', 'background', '--schedule', 'paper', '--accumulate', 8, '--precision', 'bf16')
    assert status == 0, err
    assert load_segmenter(home/'shifted').codes.values == (1, 2)
    assert command('predict', 'shifted', 'data/valid/images/0000.png', '--out', 'p')[0] == 0
    assert set(np.unique(np.asarray(Image.open(home/'p'/'0000.png')))) <= {1, 2}
    status,out,_ = command('train', 'shifted', 'data', *small[2:], '--epochs', 1, '--out', 'again', '--ignore', 'background', '--keep-head')
    assert status == 0 and 'UPerNet on shifted' in out


@pytest.mark.parametrize('args,says', [
    (['train'], 'no encoder was named'), (['train', 'encoder.safetensors'], 'no data were named'), (['train', 'none.pth', 'data'], 'none.pth is not there'),
    (['train', 'encoder.safetensors', 'none'], 'none is no folder'), (['train', *small, '--scale', 'x'], "--scale 'x' is not understood"),
    (['train', *small, '--schedule', 'cosine'], "schedule 'cosine' is unknown"), (['train', *small, '--recipe', 'mae_base'], 'did you mean mae_base_segment'),
    (['train', *small, '--accumulate', '2'], 'below the batch of 4'), (['train', *small, '--epochs', '0'], 'epochs 0 is below 1'),
    (['train', *small, '--ignore', 'sky'], "ignore='sky' is none of the classes"), (['train', '--resume', 'data'], 'holds no run of bootmae-segment'),
    (['evaluate', 'encoder.safetensors', 'data'], 'without heads for the task'), (['evaluate', 'none', 'data'], 'none is not there'),
    (['predict', 'none', 'data'], 'none is not there')])
def test_what_is_wrong_is_said_in_a_sentence(command, args, says):
    status,_,err = command(*args, *(['--out', 'new'] if args[0] == 'train' and '--resume' not in args else []))
    assert status == 2 and says in err and 'Traceback' not in err and err.startswith(f'bootmae_segment_{args[0]}: ')


def test_a_run_is_not_written_over(trained, command):
    status,_,err = command('train', *small, '--out', 'run')
    assert status == 2 and 'holds the model of an earlier run' in err
    status,_,err = command('evaluate', 'run', 'data', '--stride', '9')
    assert status == 2 and 'give window' in err
    assert command('evaluate', 'run', 'data', '--part', 'test')[0] == 2


def test_usage(command):
    status,out,_ = command('--help')
    assert status == 0 and all(f'bootmae-segment {o}' in out for o in ('train', 'evaluate', 'predict'))
    for args in ([], ['fit']): assert command(*args)[0] == 2
    status,out,_ = command('train', '--help')
    assert status == 0 and '--keep-head' in out


def test_help_answers_at_once():
    began = time.perf_counter()
    done = subprocess.run([*start, 'train', '--help'], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and 'usage: bootmae-segment train' in done.stdout and time.perf_counter() - began < 3


@pytest.mark.skipif(os.name != 'posix', reason='signals')
def test_ctrl_c_and_resume_give_the_model_of_a_run_that_was_not_stopped(trained, command, home, monkeypatch):
    def ctrl_c(self):
        if self.training and self.train_iter == 2: os.kill(os.getpid(), signal.SIGINT)
    with monkeypatch.context() as m:
        m.setattr(RunState, 'before_batch', ctrl_c, raising=False)
        status,out,err = command('train', *small, '--epochs', 3, '--lr', '3e-3', '--out', 'stopped')
    assert status == 130 and 'bootmae-segment train --resume stopped' in out, err
    assert len((home/'stopped'/'history.csv').read_text().splitlines()) == 2
    status,_,err = command('train', '--resume', 'stopped', '--lr', '2e-3')
    assert status == 2 and 'started with other settings' in err
    status,_,err = command('train', '--resume', 'stopped')
    assert status == 0, err
    a,b = (load_segmenter(home/o).state_dict() for o in ('run', 'stopped'))
    assert all((v == b[k]).all() for k,v in a.items())
    assert (home/'stopped'/'history.csv').read_text() == (home/'run'/'history.csv').read_text()
