"bootmae-detect: what it prints and writes, and what it says in a sentence and status 2 where something is wrong."
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bootmae_nb import detect_cli
from bootmae_nb.checkpoints import save_model
from bootmae_nb.detect import load_detector
from bootmae_nb.models import mim_model
from bootmae_nb.runs import RunState
from bootmae_nb.scenes import write_scenes

small = '--heads small --set width=16 head_width=32 proposals=30 samples=16 layer_decay=0.9 --img-size 32x48 --bs 3 --workers 0 --seed 5'.split()


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "Scenes, and an encoder"
    root = tmp_path_factory.mktemp('detect')
    write_scenes(root/'scenes', 6, 3, size=(48, 64), side=(16, 30))
    enc = mim_model('mae', 'vit_tiny_patch16_224', img_size=32, patch_size=8, width=24, depth=2, heads=2, pixel_width=16, pixel_depth=1, pixel_heads=2, seed=0)
    save_model(enc, root/'encoder')
    return root


@pytest.fixture
def command(console, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return partial(console, 'bootmae-detect')


@pytest.fixture(scope='module')
def trained(place):
    "A run of two epochs"
    argv,home,sys.argv = sys.argv, os.getcwd(), ['bootmae-detect', 'train', str(place/'encoder.safetensors'), str(place/'scenes'), *small, '--epochs', '2',
                                                 '--device', 'cpu', '--out', str(place/'run')]
    try: detect_cli.bootmae_detect()
    finally: sys.argv = argv; os.chdir(home)
    return place/'run'


def test_a_run_is_written(trained):
    assert {'model.safetensors', 'model.json', 'history.csv', 'results.png', 'run.json', 'state'} <= {o.name for o in trained.iterdir()}
    about = json.loads((trained/'model.json').read_text())
    assert about['training']['epochs'] == 2 and set(about['figures']) >= {'box_AP', 'mask_AP', 'valid_loss'}
    model = load_detector(trained/'model.safetensors')
    assert model.task['width'] == 16 and model.vocab == ['digit 0', 'digit 1', 'digit 7'] and model.task['min_size'] == 32
    assert len((trained/'history.csv').read_text().splitlines()) == 3 and Image.open(trained/'results.png').height > 256


def test_how_good_it_is(command, trained, place, tmp_path):
    status,out,err = command('evaluate', trained, place/'scenes', '--workers', '0', '--out', 'deep/figures.json')
    assert status == 0, err
    got = json.loads((tmp_path/'deep'/'figures.json').read_text())
    assert got['images'] == 3 and 'AP50' in out and 'digit 7' in out and got['left_out'] == []
    gt = COCO(str(place/'scenes'/'annotations'/'instances_valid.json'))
    for kind,iou in ('box', 'bbox'), ('mask', 'segm'):
        rows = json.loads((tmp_path/'deep'/f'figures_{kind}.json').read_text())
        ev = COCOeval(gt, gt.loadRes(rows), iou); ev.evaluate(); ev.accumulate(); ev.summarize()
        assert got[kind]['AP'] == pytest.approx(ev.stats[0], abs=1e-9)
    f = place/'scenes'/'train'/'images', '--annotations', place/'scenes'/'annotations'/'instances_train.json'
    status,_,err = command('evaluate', trained/'model.safetensors', *f, '--workers', '0')
    assert status == 0 and json.loads((tmp_path/'detection.json').read_text())['images'] == 6


def test_what_is_found_in_pictures(command, trained, place, tmp_path):
    images,file = place/'scenes'/'valid'/'images', place/'scenes'/'annotations'/'instances_valid.json'
    status,out,err = command('predict', trained, images, '--threshold', '0.05', '--annotations', file)
    assert status == 0, err
    folder = tmp_path/'detections'
    assert sorted(o.name for o in folder.iterdir()) == ['0000.png', '0001.png', '0002.png', 'found.json', 'results_box.json', 'results_mask.json']
    rows = json.loads((folder/'results_mask.json').read_text())
    assert rows and {o['image_id'] for o in rows} <= {1, 2, 3} and 'bbox' not in rows[0] and 'segmentation' in rows[0]
    found = COCO(str(folder/'found.json'))
    assert len(found.imgs) == 3 and len(found.anns) == sum(o['score'] >= .05 for o in rows)
    status,out,_ = command('predict', trained, images/'0000.png', images, '--threshold', '1', '--out', 'none')
    assert status == 0 and 'nothing' in out and (tmp_path/'none'/'0000_2.png').exists() and json.loads((tmp_path/'none'/'found.json').read_text())['annotations'] == []


def test_a_run_that_was_stopped_goes_on(command, trained, place, monkeypatch, tmp_path):
    def stop_at_three(self):
        if self.training and self.train_iter == 3: self.stop()
    with monkeypatch.context() as m:
        m.setattr(RunState, 'before_batch', stop_at_three, raising=False)
        status,out,_ = command('train', place/'encoder.safetensors', place/'scenes', *small, '--epochs', '2', '--out', 'run')
    assert status == 130 and 'bootmae-detect train --resume run' in out and (tmp_path/'run'/'model.safetensors').exists()
    status,_,err = command('train', 'packaged', place/'scenes', '--out', 'run')
    assert status == 2 and 'go on with it' in err
    status,_,err = command('train', '--resume', 'run', '--bs', '2')
    assert status == 2 and 'bs: 3 -> 2' in err and '--allow-changes' in err
    status,out,err = command('train', '--resume', 'run')
    assert status == 0, err
    a,b = (load_detector(o/'model.safetensors').state_dict() for o in (trained, tmp_path/'run'))
    assert all(torch.equal(v, b[k]) for k,v in a.items())


def test_other_kinds_of_runs(command, place, tmp_path):
    f = place/'scenes'/'train'/'images', '--annotations', place/'scenes'/'annotations'/'instances_train.json'
    common = *small, '--epochs', '1'
    status,out,err = command('train', place/'encoder.safetensors', *f, '--valid-pct', '0.34', '--boxes', '--schedule', 'paper', '--accumulate', '6',
                             '--precision', 'bf16',
                             '--crop', 'resized', '--scale', '0.4,1', '--vflip', '--in-chans', '1', *common, '--out', 'boxes')
    assert status == 0, err
    assert 'Faster R-CNN' in out and 'bf16' in out and '4 training images' in out
    model = load_detector(tmp_path/'boxes'/'model.safetensors')
    assert not model.task['masks'] and model.in_chans == 1
    status,out,err = command('predict', 'boxes', place/'scenes'/'valid'/'images')
    assert status == 0 and not (tmp_path/'detections'/'results_mask.json').exists()


@pytest.mark.parametrize('args,words', [
    (('train',), 'no encoder was named'), (('train', 'packaged'), 'no data were named'),
    (('train', 'packaged', 'nowhere'), 'nowhere is not there'), (('train', 'packaged', '{scenes}', '--scale', '3'), "scale '3' is not understood"),
    (('train', 'packaged', '{scenes}', '--schedule', 'fast'), "schedule 'fast' is unknown"), (('train', 'packaged', '{scenes}', '--epochs', '0'), 'epochs 0 is below 1'),
    (('train', 'packaged', '{scenes}', '--bs', '4', '--accumulate', '6'), 'no multiple of the batch size 4'),
    (('train', 'packaged', '{scenes}', '--set', 'wings=2'), 'wings is no size of the heads'),
    (('train', 'packaged', '{scenes}', '--valid-images', 'a'), 'go with --annotations'), (('train', 'none.pth', '{scenes}'), 'none.pth'),
    (('train', '--resume', 'none'), 'holds no run of bootmae-detect'), (('train', 'packaged', '{scenes}', '--img-size', 'big'), "image size 'big'"),
    (('evaluate', '{run}', '{scenes}', '--part', 'dev'), 'no annotations for dev'), (('evaluate', '{encoder}', '{scenes}'), 'without heads'),
    (('evaluate', '{run}', '{scenes}', '--max-dets', '0'), 'max_dets 0'), (('predict', '{run}', 'none.png'), 'none.png'),
    (('predict', '{run}', 'photos', '--threshold', '2'), 'outside [0, 1]'), (('predict', '{run}', 'photos', '--annotations', '{valid}'), 'does not name'),
    (('fly',), "'fly' is unknown"), ((), 'nothing was said')])
def test_what_is_wrong_is_said_in_a_sentence(command, trained, place, args, words, tmp_path):
    names = dict(scenes=place/'scenes', run=trained, encoder=place/'encoder.safetensors', valid=place/'scenes'/'annotations'/'instances_valid.json')
    status,_,err = command(*[o.format(**names) for o in args])
    assert status == 2 and words in err and 'Traceback' not in err
    assert not list(Path(tmp_path).rglob('*.safetensors'))


def test_help_is_quick_and_complete():
    code = "import sys; sys.argv = ['bootmae-detect', {}]; from bootmae_nb.detect_cli import bootmae_detect; bootmae_detect()"
    for args,words in (("'--help'", ['train', 'evaluate', 'predict']), ("'train', '--help'", ['--img-size', '--valid-annotations', '--resume'])):
        done = subprocess.run([sys.executable, '-c', code.format(args)], capture_output=True, text=True)
        assert done.returncode == 0 and all(o in done.stdout for o in words)
    done = subprocess.run([sys.executable, '-c', "import sys, bootmae_nb.detect_cli; print('torch' in sys.modules)"], capture_output=True, text=True)
    assert done.stdout.strip() == 'False'
