"""Scorecards: each row is what the probe says when it is called directly, baselines are what they are called, and nothing but the card is changed."""
import json
import random
import warnings

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits

from common import equal, quietly, state
from bootmae_nb import scorecard as module
from bootmae_nb.checkpoints import load_model, save_model
from bootmae_nb.evaluate import encoder_features, knn_predict
from bootmae_nb.finetune import Classifier, finetune_learner, make_classifier
from bootmae_nb.labelled import few_labels, labelled_dls, labelled_items, labelled_tensors, plain_loader
from bootmae_nb.models import mim_model, model_from_config
from bootmae_nb.probes import linear_probe, quick_probe
from bootmae_nb.adapt import bare_config, encoder_at
from bootmae_nb.scorecard import scorecard

tiny = dict(arch='vit_tiny_patch16_224', patch_size=4, width=16, depth=3, heads=2, pixel_width=16, pixel_depth=1, feature_depth=1)
more = dict(num_workers=0, device='cpu')


def pictures(per_class=12, classes=3, size=8, seed=0):
    "Pairs of a picture and its class, which is its brightness"
    g = np.random.default_rng(seed)
    return [((g.random((size, size, 3))*90 + 50*c).astype('uint8'), 'cab'[c]) for c in range(classes) for _ in range(per_class)]


@pytest.fixture(scope='module')
def source(): return pictures()


@pytest.fixture(scope='module')
def some_digits():
    "Some of scikit-learn's digits, as pairs"
    d = load_digits()
    return [((x*15.9).astype('uint8'), int(y)) for x,y in zip(d.images[:240], d.target)]


@pytest.fixture
def model(): return mim_model('bootmae', **tiny, img_size=8, seed=0)


@pytest.fixture(scope='module')
def digits_card(some_digits):
    "Features probes of digits, all labels and few, with baselines"
    return scorecard(mim_model('mae', **{k: v for k,v in tiny.items() if k != 'feature_depth'}, img_size=8, seed=0), some_digits, ('knn', 'linear', 'lars'), (None, 4),
                     baselines=True, valid_pct=.4, seed=3, **more)


@pytest.fixture(scope='module')
def tuned(source, tmp_path_factory):
    "A fine-tuned file and the card that says how good it is"
    file = tmp_path_factory.mktemp('tuned')/'tuned.safetensors'
    card = scorecard(mim_model('bootmae', **tiny, img_size=8, seed=0), source, ('finetune',), epochs=2, lr=5e-3, bs=8, quiet=True, save=file, **more)
    return file, card


# rows

def test_rows_are_what_the_probes_say_when_called_directly(digits_card, some_digits):
    net = mim_model('mae', **{k: v for k,v in tiny.items() if k != 'feature_depth'}, img_size=8, seed=0)
    dls = labelled_dls(some_digits, 8, valid_pct=.4, seed=3, **more)
    (train,y),(test,ty) = (encoder_features(net, o, block='all') for o in (plain_loader(dls), dls.valid))
    rows = {(r.probe, r.labels): r for r in digits_card.rows if r.model == 'model'}
    assert list(rows) == [(p, n) for n in (None, 4) for p in ('knn', 'linear', 'lars')]
    for n in (None, 4):
        at = list(range(len(y))) if n is None else few_labels(y, n, 3)
        some = {b: x[at] for b,x in train.items()}
        assert torch.equal(rows['knn', n].pred, knn_predict(some[2], y[at], test[2], 20))
        q = quick_probe(some, y[at], test, ty, seed=3)
        assert torch.equal(rows['linear', n].pred, q.pred) and torch.equal(rows['linear', n].probs, q.probs) and rows['linear', n].settings == q.settings
        block = rows['lars', n].settings['block']                                           # blocks 3 of 3: round(30/12) counted from 1
        p = linear_probe(some[1], y[at], test[1], ty, bs=len(at), seed=3)
        assert block == 1 and torch.equal(rows['lars', n].pred, p.pred)
        for r in (rows[p, n] for p in ('knn', 'linear', 'lars')):
            assert r.images == len(at) and r.report.accuracy == pytest.approx((r.pred == ty).double().mean().item(), abs=1e-12)
    assert torch.equal(digits_card.targ, ty) and len(digits_card.images) == len(ty)


def test_the_middle_block_is_that_of_the_papers():
    assert [module._middle(d) for d in (12, 24, 6, 2)] == [9, 19, 4, 1]


def test_few_labels_are_nested_and_the_test_images_stay(some_digits, monkeypatch):
    asked,own = [], module.few_labels
    monkeypatch.setattr(module, 'few_labels', lambda *a: asked.append(own(*a)) or asked[-1])
    card = scorecard(encoder_at(mim_model('bootmae', **tiny, img_size=8)), some_digits, ('knn',), (1, 2, 5, .5), valid_pct=.4, **more)
    sets = {len(o): set(o) for o in asked}
    sizes = [r.images for r in card.rows]
    assert sizes[:3] == [10, 20, 50] and sets[10] < sets[20] < sets[50] <= sets[max(sizes)]
    assert {len(r.pred) for r in card.rows} == {len(card.targ)} == {card.about['test']}


def test_labels_of_test_images_are_in_the_order_of_the_data(source, model):
    at = [30, 1, 13, 25, 2]                                                               # out of order: the split sorts them
    card = scorecard(model, source, ('knn',), valid=at, **more)
    found = labelled_items(source, valid=at)
    assert card.vocab == ['a', 'b', 'c'] and [card.vocab[i] for i in card.targ] == [source[i][1] for i in sorted(at)] == [source[i][1] for i in found.split[1]]
    assert np.abs(card.images[0].permute(1, 2, 0).numpy()*255 - source[1][0]).max() < .51
    assert (card.about['labelled'], card.about['test']) == (31, 5)


def test_pooling_and_neighbours_reach_the_probe(source, model):
    dls = labelled_dls(source, 8, **more)
    (train,y),(test,_) = (encoder_features(model, o, 'cls') for o in (plain_loader(dls), dls.valid))
    card = scorecard(model, source, ('knn',), pool='cls', k=1, **more)
    assert torch.equal(card.rows[0].pred, knn_predict(train, y, test, 1)) and card.rows[0].settings == dict(k=1)


# baselines

def test_baselines_are_the_untrained_network_and_the_pixels(digits_card, some_digits):
    net = mim_model('mae', **{k: v for k,v in tiny.items() if k != 'feature_depth'}, img_size=8, seed=0)
    dls = labelled_dls(some_digits, 8, valid_pct=.4, seed=3, **more)
    fresh = model_from_config(bare_config(net), 3)
    rows = {(r.model, r.probe): r for r in digits_card.rows if r.labels is None}
    def pixels(o): x,y = labelled_tensors(o); return x.flatten(1), y
    for name,take in (('untrained', lambda o: encoder_features(fresh, o)), ('pixels', pixels)):
        (train,y),(test,_) = take(plain_loader(dls)), take(dls.valid)
        assert torch.equal(rows[name, 'knn'].pred, knn_predict(train, y, test, 20))
    assert [r.model for r in digits_card.rows] == ['model']*6 + ['untrained']*6 + ['pixels']*6


def test_the_untrained_network_has_weights_of_its_own_that_the_seed_decides(source, monkeypatch):
    seen = []
    own = module.encoder_features
    monkeypatch.setattr(module, 'encoder_features', lambda net, *a, **k: seen.append(net) or own(net, *a, **k))
    trained = mim_model('bootmae', **tiny, img_size=8, seed=5)
    with torch.no_grad():
        for p in trained.encoder.parameters(): p += .1
    for s in (5, 5, 6): scorecard(trained, source, ('knn',), baselines=True, seed=s, **more)
    a,b,c = (state(o.encoder) for o in seen[2::4])
    weights = lambda d: {k: v for k,v in d.items() if 'qkv.weight' in k}
    assert equal(a, b) and not equal(weights(a), weights(c))
    assert not any(torch.equal(v, trained.encoder.state_dict()[k]) for k,v in weights(a).items())
    assert all(v.mean().abs() < .05 < .08 < trained.encoder.state_dict()[k].mean() for k,v in weights(a).items())          # an untrained one, not the disturbed one


# other sizes

def test_a_size_that_patches_do_not_fill_is_refused(model):
    with pytest.raises(ValueError, match='not divisible by the patch size 4'): scorecard(model, pictures(), img_size=10, **more)


def test_a_scorecard_of_another_size_says_so(source, model):
    assert scorecard(model, source, ('knn',), img_size=(8, 12), **more).about['img_size'] == [8, 12]


def test_the_packaged_model_by_its_name(source):
    try: model = load_model('packaged')
    except (ValueError, OSError): pytest.skip('needs the packaged model, which is not there')
    got = encoder_at('packaged', 32)
    assert got.img_size == (32, 32) and equal(state(got.encoder.vit.blocks), state(model.encoder.vit.blocks))
    assert scorecard('packaged', source, ('knn',), img_size=16, **more).rows[0].images == 30


def test_a_network_of_timm_needs_no_conversion(source):
    vit = timm.create_model('vit_tiny_patch16_224', img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    assert scorecard(vit, source, ('knn',), img_size=8, **more).rows[0].images == 30


# the own head

def test_the_own_head_says_what_the_fine_tuned_model_said(tuned, source):
    file,card = tuned
    again = scorecard(file, source, ('head', 'knn'), **more)
    head = again.rows[0]
    assert (head.probe, head.images, head.labels) == ('head', 0, None)
    assert torch.allclose(head.probs, card.rows[0].probs, atol=1e-6) and torch.equal(head.pred, card.rows[0].pred)
    assert torch.equal(again.targ, card.targ) and json.loads(file.with_suffix('.json').read_text())['finetuned']['accuracy'] == card.rows[0].report.accuracy


def test_the_classes_of_the_head_are_put_into_the_order_of_the_data(tuned, source, tmp_path):
    own = Classifier(load_model(tuned[0]))
    perm = [2, 0, 1]
    with torch.no_grad():
        for p in (own.encoder.vit.head.weight, own.encoder.vit.head.bias): p.copy_(p[perm])
    own.config['classifier'] = dict(own.config['classifier'], vocab=[own.vocab[i] for i in perm])
    got = scorecard(save_model(own, tmp_path/'m'), source, ('head',), **more)
    assert torch.allclose(got.rows[0].probs, scorecard(tuned[0], source, ('head',), **more).rows[0].probs, atol=1e-6)


def test_a_head_of_other_classes_is_refused(tuned):
    other = [(x, dict(a='x').get(c, c)) for x,c in pictures()]
    with pytest.raises(ValueError, match="head knows the classes a, b, c, and the images are of b, c, x"): scorecard(tuned[0], other, ('head',), **more)
    with pytest.raises(ValueError, match='no head for classes'): scorecard(mim_model('bootmae', **tiny, img_size=8), pictures(), ('head',), **more)


def test_of_a_model_with_an_average_it_is_the_average_that_is_measured(source):
    learn = finetune_learner(labelled_dls(source, 8, 8, **more), mim_model('bootmae', **tiny, img_size=8, seed=0), ema=.9)
    quietly(learn, 'fit', 1, 5e-3)
    card = scorecard(learn.model, source, ('head', 'knn'), **more)
    filed = scorecard(learn.model.for_file(), source, ('head', 'knn'), **more)
    raw = make_classifier(learn.model, learn.model.vocab, keep_head=True)
    raw.encoder.load_state_dict(learn.model.encoder.state_dict())
    assert torch.equal(card.rows[0].probs, filed.rows[0].probs)
    assert not torch.allclose(card.rows[0].probs, scorecard(raw, source, ('head',), **more).rows[0].probs, atol=1e-7)


# what is wrong

def test_bad_files_are_left_out_and_named(tmp_path, model):
    for i,(x,c) in enumerate(pictures(6)):
        (tmp_path/c).mkdir(exist_ok=True); Image.fromarray(x).save(tmp_path/c/f'{i}.png')
    (tmp_path/'a'/'broken.png').write_bytes(b'no picture')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        card = scorecard(model, tmp_path, ('knn',), **more)
    assert card.about['left_out'] == [str(tmp_path/'a'/'broken.png')] and card.about['labelled'] + card.about['test'] == 18
    assert json.loads(card.save(tmp_path/'card.json').read_text())['left_out'] == card.about['left_out']


def test_a_class_without_training_images_has_probability_0(tmp_path, model):
    "Its only image is a file that cannot be read"
    for i,(x,c) in enumerate(pictures(6)):
        (tmp_path/c).mkdir(exist_ok=True); Image.fromarray(x).save(tmp_path/c/f'{i}.png')
    (tmp_path/'0').mkdir(); (tmp_path/'0'/'broken.png').write_bytes(b'no picture')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        card = scorecard(model, tmp_path, ('linear', 'lars'), (None, 2), **more)
    assert card.vocab == ['0', 'a', 'b', 'c'] and [r.images for r in card.rows[2:]] == [6, 6]
    for r in card.rows:
        assert r.probs.shape == (len(card.targ), 4) and not r.probs[:, 0].any() and torch.allclose(r.probs.sum(1), torch.ones(len(r.probs)), atol=1e-5)
        assert torch.equal(r.probs.argmax(1), r.pred)


@pytest.mark.parametrize('kw,says', [
    (dict(probes=('svm',)), "probe 'svm' is unknown: choose from knn, linear, lars, finetune, head"),
    (dict(probes=()), 'nothing was asked for'), (dict(labels=()), 'nothing was asked for'),
    (dict(k=0), 'k=0 neighbours cannot vote'),
    (dict(labels=(None, 11)), '11 labels per class are more than there are'),
    (dict(labels=(0.,)), '0.0 is no number of labels')])
def test_what_cannot_be_is_said_before_anything_is_computed(kw, says, source, model, monkeypatch):
    monkeypatch.setattr(module, 'encoder_features', lambda *a, **k: pytest.fail('features were taken'))
    monkeypatch.setattr(module, '_fine_tuned', lambda *a, **k: pytest.fail('it was fine-tuned'))
    with pytest.raises(ValueError, match=says.replace('.', r'\.')): scorecard(model, source, **more, **kw)


# the card

def test_json_is_whole_strict_and_reads_back(digits_card, source, model, tmp_path, monkeypatch):
    file = tmp_path/'card.json'
    assert digits_card.save(file) == file
    got = json.loads(file.read_text())
    assert got == json.loads(json.dumps(digits_card.to_dict(), default=str)) and [r['accuracy'] for r in got['rows']] == [r.report.accuracy for r in digits_card.rows]
    one = scorecard(model, source, ('linear',), (1,), **more)                             # of one image nothing can be held out
    assert one.rows[0].settings['held_out'] != one.rows[0].settings['held_out']
    def no(name): raise AssertionError(f'{name} is not JSON')
    assert json.loads(one.save(tmp_path/'one.json').read_text(), parse_constant=no)['rows'][0]['settings']['held_out'] is None
    before = file.read_bytes()
    monkeypatch.setattr(type(one), 'to_dict', lambda self: dict(a={(1, 2): 3}))
    with pytest.raises(TypeError): one.save(file)
    assert file.read_bytes() == before and sorted(o.name for o in tmp_path.iterdir()) == ['card.json', 'one.json']


def test_table_best_and_errors(digits_card):
    t = digits_card.table()
    assert len(t) == 18 and t['labels'][3] == '4 per class: 40' and t['labels'][0] == f'all {digits_card.rows[0].images}'
    assert t['accuracy %'].tolist() == [f'{100*r.report.accuracy:.1f}' for r in digits_card.rows]
    best = digits_card.best()
    assert best.model == 'model' and best.report.accuracy == max(r.report.accuracy for r in digits_card.rows if r.model == 'model')
    assert digits_card.errors(n=4).width > 50 and digits_card.confusion().width > 50
    digits_card.rows,rows = digits_card.rows[:1], digits_card.rows
    with pytest.raises(ValueError, match="add the probe 'linear'"): digits_card.errors()
    digits_card.rows = rows


def test_a_seed_repeats_the_table_and_nothing_else_is_changed(source, model):
    model.train(); model.encoder.vit.blocks[0].eval()
    for p in model.encoder.vit.blocks[1].parameters(): p.requires_grad_(False)
    keep = lambda: (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), [m.training for m in model.modules()],
                    [p.requires_grad for p in model.parameters()])
    before,weights = keep(), state(model)
    cards = [scorecard(model, source, ('knn', 'linear', 'lars', 'finetune'), (3,), baselines=True, epochs=1, bs=8, seed=s, quiet=True, **more) for s in (1, 1, 2)]
    plain = [[(r.model, r.probe, r.labels, r.images, r.report.to_dict()) for r in c.rows] for c in cards]
    assert plain[0] == plain[1] != plain[2]
    assert keep() == before and equal(weights, state(model))
    assert [(r.model, r.probe) for r in cards[0].rows if r.probe == 'finetune'] == [('model', 'finetune'), ('untrained', 'finetune')]


def test_the_own_head_leaves_a_frozen_model_frozen(tuned, source):
    frozen = load_model(tuned[0]).requires_grad_(False)
    scorecard(frozen, source, ('head',), **more)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_rows_are_told_when_they_are_there(source, model):
    told = []
    card = scorecard(model, source, ('knn', 'linear'), log=told.append, **more)
    assert told == card.rows


def test_features_are_kept_and_found(source, model, tmp_path, monkeypatch):
    a = scorecard(model, source, ('knn',), cache=tmp_path, **more)
    assert len(list(tmp_path.iterdir())) == 6                                             # three blocks, training and test
    monkeypatch.setattr('bootmae_nb.evaluate._run', lambda *a, **k: pytest.fail('features were computed anew'))
    assert torch.equal(scorecard(model, source, ('knn',), cache=tmp_path, **more).rows[0].pred, a.rows[0].pred)
