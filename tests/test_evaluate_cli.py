"""bootmae-evaluate: what it prints and writes, and what it says in a sentence and status 2 where something is wrong."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from bootmae_nb import scorecard as module
from bootmae_nb.checkpoints import load_model, save_model
from bootmae_nb.models import mim_model
from bootmae_nb.scorecard import scorecard

tiny = dict(arch='vit_tiny_patch16_224', patch_size=4, width=16, depth=2, heads=2, pixel_width=16, pixel_depth=1, feature_depth=1, img_size=8)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory): return save_model(mim_model('bootmae', **tiny, seed=0), tmp_path_factory.mktemp('run')/'model')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Dark, grey and light images, for training and for validation, and a broken one in each part"
    root,g = tmp_path_factory.mktemp('labelled'), np.random.default_rng(0)
    for part,n in ('train', 8), ('valid', 4):
        for i,c in enumerate(['dark', 'grey', 'light']):
            (root/part/c).mkdir(parents=True)
            for k in range(n): Image.fromarray((g.random((8, 8, 3))*80 + 60*i).astype('uint8')).save(root/part/c/f'{k}.png')
        (root/part/'grey'/'broken.png').write_text('<html>not found</html>')
    return root


@pytest.fixture
def evaluate(tmp_path, console, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *args: console('bootmae-evaluate', *args, '--workers', 0)


def rows_of(path): return [(r['model'], r['probe'], r['labels'], r['images']) for r in json.loads(path.read_text())['rows']]


def test_probes_of_a_folder_are_printed_and_written(evaluate, checkpoint, folder, tmp_path):
    status,out,err = evaluate(checkpoint, folder, '--probe', 'knn,linear,lars', '--labels', '2,0.5,all', '--seed', '5')
    assert status == 0, err
    got = json.loads((tmp_path/'evaluation.json').read_text())
    assert rows_of(tmp_path/'evaluation.json') == [('model', p, n, m) for n,m in ((2, 6), (.5, 12), (None, 24)) for p in ('knn', 'linear', 'lars')]
    card = scorecard(checkpoint, folder, ('knn', 'linear', 'lars'), (2, .5, None), seed=5, num_workers=0, device='cpu')
    same = [{k: v for k,v in r.to_dict().items() if k != 'seconds'} for r in card.rows]
    assert [{k: v for k,v in r.items() if k != 'seconds'} for r in got['rows']] == json.loads(json.dumps(same))
    assert sorted(got['left_out']) == sorted(str(folder/o/'grey'/'broken.png') for o in ('train', 'valid'))
    assert 'images cannot be read and are left out' in err and 'broken.png' in err
    assert (got['labelled'], got['test'], got['vocab'], got['seed'], got['checkpoint']) == (24, 12, ['dark', 'grey', 'light'], 5, str(checkpoint))
    assert '24 training and 12 test images of 3 classes, 8 x 8 pixels' in out
    assert all(o in out for o in ('k-NN', 'logistic regression', 'linear probe (LARS)', 'evaluation.json'))
    names = sorted(o.name for o in tmp_path.iterdir())
    assert set(names) <= {'evaluation.json', 'evaluation_confusion.png', 'evaluation_errors.png'} and 'evaluation_confusion.png' in names
    for n in names[1:]: assert Image.open(n).width > 50 and n in out


def test_digits_with_baselines_to_a_file_of_a_name(evaluate, checkpoint, tmp_path):
    out = tmp_path/'deep'/'digits.json'
    status,_,err = evaluate(checkpoint, 'digits', '--probe', 'knn', '--labels', '10,0.5', '--valid-pct', '0.1', '--baselines', '--k', '3', '--pool', 'cls',
                             '--img-size', '8x12', '--out', out)
    assert status == 0, err
    assert [o[:3] for o in rows_of(out)] == [(m, 'knn', n) for m in ('model', 'untrained', 'pixels') for n in (10, .5)]
    got = json.loads(out.read_text())
    assert got['img_size'] == [8, 12] and got['pool'] == 'cls' and got['rows'][0]['settings'] == dict(k=3) and got['rows'][0]['accuracy'] > .3
    assert sorted(o.name for o in out.parent.iterdir()) == ['digits.json', 'digits_confusion.png']                   # votes have no probabilities: no picture of errors


def test_the_fine_tuned_file_answers_with_its_own_head(evaluate, checkpoint, folder, tmp_path):
    file = tmp_path/'tuned.safetensors'
    status,out,err = evaluate(checkpoint, folder, '--probe', 'finetune', '--epochs', '2', '--lr', '5e-3', '--bs', '8', '--set', 'layer_decay=0.9',
                               '--save', file, '--out', 'a.json')
    assert status == 0 and f'fine-tuned model: {file}' in out, err
    assert load_model(file).config['classifier']['vocab'] == ['dark', 'grey', 'light']
    assert not torch.equal(load_model(file).encoder.vit.blocks[0].mlp.fc1.weight, load_model(checkpoint).encoder.vit.blocks[0].mlp.fc1.weight)
    status,_,err = evaluate(file, folder, '--probe', 'head', '--out', 'b.json')
    assert status == 0, err
    a,b = (json.loads((tmp_path/o).read_text())['rows'][0] for o in ('a.json', 'b.json'))
    assert a['accuracy'] == b['accuracy'] and a['classes'] == b['classes'] and (b['probe'], b['images']) == ('head', 0) and a['settings'] == dict(epochs=2, lr=.005)


def test_features_are_kept_in_a_folder(evaluate, checkpoint, folder, tmp_path, monkeypatch):
    assert evaluate(checkpoint, folder, '--probe', 'knn', '--features', tmp_path/'f')[0] == 0
    assert len(list((tmp_path/'f').iterdir())) == 4
    monkeypatch.setattr('bootmae_nb.evaluate._run', lambda *a, **k: pytest.fail('features were computed anew'))
    assert evaluate(checkpoint, folder, '--probe', 'knn', '--features', tmp_path/'f')[0] == 0


@pytest.mark.parametrize('args,says', [
    (['CHECKPOINT', 'FOLDER', '--probe', 'svm'], "probe 'svm' is unknown: choose from knn, linear, lars, finetune, head"),
    (['CHECKPOINT', 'FOLDER', '--labels', 'many'], "labels 'many' are not understood"),
    (['CHECKPOINT', 'FOLDER', '--labels', '10,'], "labels '' are not understood"),
    (['CHECKPOINT', 'FOLDER', '--labels', '500'], '500 labels per class are more than there are for 3 of 3 classes'),
    (['CHECKPOINT', 'FOLDER', '--labels', '0'], '0 is no number of labels'),
    (['CHECKPOINT', 'FOLDER', '--save', 'x.safetensors'], '--save keeps the fine-tuned model: add --probe finetune'),
    (['CHECKPOINT', 'FOLDER', '--set', 'mixup=0.8'], '--set is about fine-tuning: add --probe finetune'),
    (['CHECKPOINT', 'FOLDER', '--probe', 'finetune', '--set', 'mixup'], "--set 'mixup' is not understood"),
    (['CHECKPOINT', 'FOLDER', '--probe', 'finetune', '--set', 'mixap=0.8'], '--set mixap is unknown: did you mean mixup?; choose from pool, stats, layer_decay'),
    (['CHECKPOINT', 'FOLDER', '--out', 'FOLDER'], 'could not be written, because a folder has this name'),
    (['CHECKPOINT', 'FOLDER', '--probe', 'head'], 'no head for classes'),
    (['CHECKPOINT', 'FOLDER', '--k', '0'], 'k=0 neighbours cannot vote'),
    (['CHECKPOINT', 'FOLDER', '--img-size', '10'], 'not divisible by the patch size 4'),
    (['CHECKPOINT', 'FOLDER', '--img-size', 'big'], "image size 'big' is not understood"),
    (['CHECKPOINT', 'FOLDER', '--valid', 'exam'], "no folder 'exam'"),
    (['CHECKPOINT', 'FOLDER', '--pool', 'max'], 'max'),
    (['CHECKPOINT', 'EMPTY'], 'no images in class folders'),
    (['CHECKPOINT', '/no/such/folder'], '/no/such/folder is no folder'),
    (['/no/such/model.safetensors', 'FOLDER'], '/no/such/model.safetensors is not there')])
def test_errors_are_one_sentence_and_status_2(args, says, evaluate, checkpoint, folder, tmp_path):
    (tmp_path/'empty'/'a').mkdir(parents=True)
    at = dict(CHECKPOINT=checkpoint, FOLDER=folder, EMPTY=tmp_path/'empty')
    status,out,err = evaluate(*[at.get(o, o) for o in args])
    error = err[err.index('bootmae_evaluate: '):]                                           # after warnings of the broken files
    assert status == 2 and says in error and len(error.strip().splitlines()) == 1 and 'Traceback' not in err
    assert [o.name for o in tmp_path.iterdir()] == ['empty']


def test_an_earlier_result_is_kept_when_writing_fails(evaluate, checkpoint, folder, tmp_path, monkeypatch):
    assert evaluate(checkpoint, folder, '--probe', 'knn')[0] == 0
    before = (tmp_path/'evaluation.json').read_bytes()
    def half(o, *a, **k): raise OSError('no space left')
    monkeypatch.setattr(module.json, 'dumps', half)
    status,_,err = evaluate(checkpoint, folder, '--probe', 'knn')
    assert status == 2 and 'no space left' in err and (tmp_path/'evaluation.json').read_bytes() == before
    assert sorted(o.name for o in tmp_path.iterdir()) == ['evaluation.json', 'evaluation_confusion.png']
