"""Figures against scikit-learn and by hand, intervals that hold what they promise, pictures that can be read."""
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from bootmae_nb.metrics import Report, bootstrap, confusion_picture, difference, report, top_losses


def drawn(n=500, classes=8, seed=0):
    rng = np.random.default_rng(seed)
    targ = rng.integers(0, classes, n); logits = rng.normal(size=(n, classes)); logits[np.arange(n), targ] += 1.5
    return torch.tensor(logits).softmax(1), targ


# intervals

def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    for level in (.8, .95):
        hits = [low <= .7 <= high for i in range(400) for _,low,high in [bootstrap(rng.random(300) < .7, level, draws=400, seed=i)]]
        assert abs(np.mean(hits) - level) < .045


def test_a_paired_difference():
    rng = np.random.default_rng(2)
    hits, widths = [], []
    for i in range(300):
        hard = rng.random(300); a, b = hard < .75, np.where(rng.random(300) < .1, rng.random(300), hard) < .70
        truth = .75 - .70
        v, low, high = difference(a, b, draws=300, seed=i); hits.append(low <= truth <= high)
        widths.append((high - low)/(np.diff(bootstrap(a, draws=300)[1:])[0] + np.diff(bootstrap(b, draws=300)[1:])[0]))
        assert v == pytest.approx(a.mean() - b.mean())
    assert abs(np.mean(hits) - .95) < .045 and np.mean(widths) < .6
    assert difference(a, a) == (0, 0, 0)


def test_intervals_are_the_same_again():
    x = np.random.default_rng(0).random(1000)
    assert bootstrap(x) == bootstrap(torch.tensor(x)) != bootstrap(x, seed=1) and bootstrap([1, 1, 1]) == (1, 1, 1)
    state = np.random.get_state()[1].tolist(); bootstrap(x); assert np.random.get_state()[1].tolist() == state
    low, high = np.quantile(x[np.random.default_rng(5).integers(0, 1000, (2000, 1000))].mean(1), [.05, .95])
    assert bootstrap(x, .9, seed=5)[1:] == pytest.approx((low, high))
    for args,text in [(([],), 'at least one'), (([[1.]],), 'one number'), (([float('nan')],), 'NaN'), (([1., 0], 1.), 'level=1.0'), (([1., 0], .9, 3), '3 draws')]:
        with pytest.raises(ValueError, match=text): bootstrap(*args)
    with pytest.raises(ValueError, match='same images'): difference([1, 0], [1])


# reports

def test_a_report_equals_scikit_learn():
    probs, targ = drawn()
    r = report(probs, targ)
    assert r.accuracy == (probs.argmax(1).numpy() == targ).mean() and r.n == 500
    assert r.balanced == pytest.approx(balanced_accuracy_score(targ, probs.argmax(1))) and r.top5 == pytest.approx(top_k_accuracy_score(targ, probs, k=5))
    for c,o in enumerate(r.classes):
        pred = probs.argmax(1).numpy(); hit = ((pred == c) & (targ == c)).sum()
        assert o['name'] == str(c) and o['n'] == (targ == c).sum() and o['precision'] == pytest.approx(hit/(pred == c).sum()) and o['recall'] == pytest.approx(hit/o['n'])
    assert report(probs.argmax(1), targ).classes == r.classes and report(probs.argmax(1), targ).top5 is None


def test_columns_may_be_any_labels():
    probs, targ = drawn()
    names = np.array([3, 10, 11, 20, 21, 22, 40, 41])
    assert report(probs, names[targ], classes=names).top5 == report(probs, targ).top5
    r = report(probs, np.where(targ == 0, 99, names[targ]), classes=names)       # a class that the model does not know
    assert r.classes[-1]['name'] == '99' and r.classes[-1]['recall'] == 0 and r.classes[-1]['precision'] is None
    assert r.balanced == pytest.approx(np.mean([o['recall'] for o in r.classes if o['n']]))


def test_a_report_on_disk_and_on_paper(tmp_path):
    probs, targ = drawn()
    r = report(probs, targ, [f'a|<b>{i}' for i in range(9)])
    assert Report.load(r.save(tmp_path/'deep'/'r.json')) == r and 'NaN' not in (tmp_path/'deep'/'r.json').read_text() and json.dumps(r.to_dict())
    text = r.markdown().splitlines()
    assert text[0] == r.summary() == str(r) and len(text) == 4 + 9 and 'a\\|&lt;b>0' in text[4] and text[-1].endswith('| 0 | - | - | - |')


def test_what_is_no_prediction():
    probs, targ = drawn(10)
    for args,text in [((probs, targ[:9]), r'\(10,\)'), ((probs*float('nan'), targ), 'finite'), ((probs[:, 0], targ), 'predictions are'),
                      ((probs, targ, ['a']), 'vocab names 1'),
                      ((probs, targ/2), 'true labels are'), ((probs[:0], targ[:0]), 'no true labels'), ((probs, targ, None, [1, 2]), r'classes are .*\(8,\)')]:
        with pytest.raises(ValueError, match=text): report(*args)


# pictures

@pytest.mark.parametrize('n', [2, 10, 40, 100])
def test_confusions_for_few_and_many_classes(n):
    targ = np.arange(n).repeat(3); pred = np.where(np.arange(3*n) % 3 == 0, (targ + 1) % n, targ)
    im = confusion_picture(pred, targ, [f'class number {i}' for i in range(n)])
    assert im.mode == 'RGB' and 300 < im.width < 2200 and len(set(np.asarray(im).reshape(-1, 3).sum(1))) > 5
    if n == 100: assert im.width > 1400                                     # room for the names
    turned = confusion_picture(targ, pred, [f'class number {i}' for i in range(n)])
    assert n == 2 or np.abs(np.asarray(turned, float) - np.asarray(im)).max() > 50


def test_the_worst_mistakes_come_first():
    probs, targ = torch.tensor([[.9, .1], [.2, .8], [.6, .4], [.3, .7]]), [1, 1, 1, 0]
    shades = torch.tensor([.1, .3, .5, .7]).reshape(4, 1, 1, 1).expand(4, 3, 8, 8)
    sheet = top_losses(shades, probs, targ, ['no', 'yes'], height=40)
    wide = sheet.width//3
    seen = [np.asarray(sheet)[25, i*wide + wide//2].mean()/255 for i in range(3)]
    assert seen == pytest.approx([.1, .7, .5], abs=.02)                      # 90 %, 70 %, 60 % sure
    assert top_losses(shades, probs, targ, n=1, height=40).width < sheet.width/2 and top_losses(shades, probs, [0, 1, 0, 1]) is None
    files = [np.full((8, 8), 200, np.uint8)]*4
    assert top_losses(files, probs, targ, columns=2, height=40).height > 100
    with pytest.raises(ValueError, match='need probabilities'): top_losses(shades, torch.tensor([0, 1, 0, 1]), targ)
    with pytest.raises(ValueError, match='3 images and 4 predictions'): top_losses(shades[:3], probs, targ)
