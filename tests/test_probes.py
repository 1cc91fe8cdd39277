"""Linear probes: as good as scikit-learn's own, LARS by its formula, chosen without the test set, and no trace left in a training."""
import math
import warnings

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from bootmae_nb.data import mim_dls
from bootmae_nb.evaluate import KNNProbe, encoder_features
from bootmae_nb.labelled import labelled_dls
from bootmae_nb.learner import mim_learner
from bootmae_nb.models import mim_model
from bootmae_nb.probes import FeatureProbe, FrozenProbe, ProbeCallback, linear_head, linear_probe, linear_probe_learner, probe_lars, probe_schedule, quick_probe
from bootmae_nb.runs import RunState

size = dict(patch_size=8, width=32, depth=2, heads=2)


@pytest.fixture(scope='module')
def digits():
    d = load_digits()
    x, y = torch.tensor(d.data).float(), torch.tensor(d.target)
    return x[:1000], y[:1000], x[1000:], y[1000:]


# logistic regression

@pytest.mark.parametrize('c', [.001, .1, 1.])
def test_the_quick_probe_equals_plain_scikit_learn(digits, c):
    a, y, b, z = digits
    scale = StandardScaler().fit(a)
    plain = LogisticRegression(C=c, max_iter=2000).fit(scale.transform(a), y)
    found = quick_probe(a, y, b, z, cs=(c,))
    assert abs(found.accuracy - plain.score(scale.transform(b), z)) < .01 and found.settings['C'] == c
    assert np.abs(found.probs.numpy() - plain.predict_proba(scale.transform(b))).max() < .02
    assert found.accuracy == (found.pred == z).double().mean().item() and np.allclose(found.probs.sum(1), 1)


def test_strength_and_block_are_chosen_without_the_test_set(digits):
    a, y, b, z = digits
    noise = torch.randn(len(a) + len(b), 64, generator=torch.Generator().manual_seed(0))
    blocks = {0: noise[:1000], 3: a, 5: a + noise[:1000]*20}, {0: noise[1000:], 3: noise[1000:], 5: b}    # on the test images block 3 is the worst
    found = quick_probe(blocks[0], y, blocks[1], z, together=True, cs=(.01, .1))
    assert found.settings['block'] == 3 and found.accuracy < .3 and list(found.table.block) == [0, 3, 5, 'all']
    for shuffled in (z.flip(0), z*0):
        other = quick_probe(blocks[0], y, blocks[1], shuffled, together=True, cs=(.01, .1))
        assert other.settings == found.settings and torch.equal(other.probs, found.probs)


def test_few_labels_any_labels_and_the_same_again(digits):
    a, y, b, z = digits
    names = torch.tensor([5, -3, 100, 7, 8, 9, 11, 12, 13, 14])
    first = torch.tensor([int((y == c).nonzero()[0]) for c in range(10)])
    one = quick_probe(a[first], names[y[first]], b, names[z])                 # one image per class: nothing to choose with
    assert one.settings['C'] == 1 and math.isnan(one.settings['held_out']) and one.accuracy > .4 and set(one.pred.tolist()) <= set(names.tolist())
    at = torch.arange(60)
    few = quick_probe(a[at], y[at], b, z)
    assert torch.equal(few.probs, quick_probe(a[at], y[at], b, z).probs) and few.accuracy > .7
    state = np.random.get_state()[1].tolist(), torch.get_rng_state()
    quick_probe(a[at], y[at], b, z); assert np.random.get_state()[1].tolist() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    two = quick_probe(a[y < 2], y[y < 2], b, z)
    assert two.probs.shape == (len(b), 2) and two.classes.tolist() == [0, 1]


@pytest.mark.parametrize('probe', [quick_probe, linear_probe])
def test_what_cannot_be_probed(digits, probe):
    a, y, b, z = digits
    nan = a.clone(); nan[3, 3] = float('inf')
    for args,text in [((nan, y, b, z), 'training features hold NaN'), ((a, y, b[:, :5], z), 'test features 5'), ((a, y[:5], b, z), 'training labels'),
                      ((a, y, b, z[:5]), 'test labels'), ((a, y*0, b, z), 'all training images are of class 0'), ((a, y.float(), b, z), 'whole number')]:
        with pytest.raises(ValueError, match=text): probe(*args)


def test_arguments_of_probes(digits):
    a, y, b, z = digits
    for kw,text in [(dict(cs=()), 'no strengths'), (dict(cs=(0.,)), 'no strengths'), (dict(held_out=1.), 'held_out=1.0')]:
        with pytest.raises(ValueError, match=text): quick_probe(a, y, b, z, **kw)
    for kw,text in [(dict(bs=1), 'bs=1'), (dict(epochs=0), 'epochs=0'), (dict(epochs=5), '10 epochs of warm-up do not fit into 5')]:
        with pytest.raises(ValueError, match=text): linear_probe(a, y, b, z, **kw)


# LARS

def test_lars_is_its_formula():
    g = torch.Generator().manual_seed(0)
    w, b = (nn.Parameter(torch.randn(*s, generator=g)) for s in ((4, 3), (4,)))
    opt, want, m = probe_lars([w, b], lr=.7), [w.detach().clone(), b.detach().clone()], [torch.zeros(4, 3), torch.zeros(4)]
    for i in range(5):
        for g_ in opt.param_groups: g_['lr'] = .7/(i + 1)
        w.grad, b.grad = torch.randn(4, 3, generator=g), torch.randn(4, generator=g)
        trust = .001*want[0].norm()/w.grad.norm()
        m[0] = .9*m[0] + trust*w.grad; m[1] = .9*m[1] + b.grad
        want = [want[0] - .7/(i + 1)*m[0], want[1] - .7/(i + 1)*m[1]]
        opt.step()
        assert torch.allclose(w.data, want[0], atol=1e-6) and torch.allclose(b.data, want[1], atol=1e-5)


def test_the_schedule():
    f = probe_schedule(90, 10, 6.4)
    assert f(0.) == 0 and f(5/90) == pytest.approx(3.2) and f(10/90) == pytest.approx(6.4) and f(50/90) == pytest.approx(3.2) and f(1.) == pytest.approx(0, abs=1e-6)
    assert probe_schedule(5, 0, 1.)(0.) == 1


def test_the_head():
    x = torch.randn(64, 12)*5 + 3
    bootmae, mae = linear_head(12, 3), linear_head(12, 3, layer_norm=False)
    assert [n for n,_ in bootmae.named_parameters()] == ['2.weight', '2.bias'] and [n for n,_ in mae.named_parameters()] == ['1.weight', '1.bias']
    normed = (x - x.mean(1, keepdim=True))/x.std(1, keepdim=True, unbiased=False)
    for head,z in ((bootmae, normed), (mae, x)):
        z = (z - z.mean(0))/z.std(0, unbiased=False)
        assert torch.allclose(head.train()(x), z @ head[-1].weight.T, atol=1e-4) and .005 < head[-1].weight.std() < .015
    assert torch.equal(linear_head(12, 3)[2].weight, bootmae[2].weight) and not torch.equal(linear_head(12, 3, seed=1)[2].weight, bootmae[2].weight)


def test_the_papers_probe_on_features(digits):
    a, y, b, z = digits
    state = torch.get_rng_state()
    found = linear_probe(a, y, b, z, bs=64, lr=6.4, epochs=30, warmup=3, layer_norm=False)
    assert torch.equal(torch.get_rng_state(), state) and found.accuracy > .88 and found.settings == dict(lr=6.4, steps=480) and len(found.table) == 30
    again = linear_probe(a, y, b, z, bs=64, lr=6.4, epochs=30, warmup=3, layer_norm=False)
    assert torch.equal(found.probs, again.probs) and found.table.loss[29] < .5*found.table.loss[0]
    with torch.no_grad(): assert torch.allclose(found.head(b).softmax(1), found.probs, atol=1e-5)
    large = linear_probe(a[:65], y[:65] + 7, b, z + 7)                       # a batch larger than the data; any labels
    assert large.settings == dict(lr=6.4, steps=90) and large.accuracy > .5 and large.classes.min() == 7
    assert linear_probe(a[:65], y[:65], b, z, bs=64, epochs=12).settings['steps'] == 12      # a last batch of one is left out
    with torch.no_grad(): assert linear_probe(a[:65], y[:65], b, z, epochs=12).accuracy > .1


# on images

@pytest.fixture(scope='module')
def encoder(): return mim_model('mae', 'vit_tiny_patch16_224', img_size=32, in_chans=1, **size, pixel_width=32, pixel_depth=1, pixel_heads=2, seed=0)


def few(): return labelled_dls('digits', 32, labels=8, in_chans=1, flip=False, bs=20, device='cpu', num_workers=0)


@pytest.mark.parametrize('kw', [dict(), dict(block=0), dict(pool='cls'), dict(pool='mean+cls', norm=False), dict(block=0, norm=True)])
def test_a_frozen_probe_sees_the_features(encoder, kw):
    x = torch.rand(5, 1, 32, 32)
    probe = FrozenProbe(encoder, 3, **kw).eval()
    assert torch.allclose(probe(x), probe.head(encoder_features(encoder, x, **kw)[0]), atol=1e-5)


def test_training_on_images_moves_the_head_alone(encoder):
    before = {k: v.clone() for k,v in encoder.state_dict().items()}
    runs = []
    for _ in range(2):
        learn = linear_probe_learner(few(), encoder, block=0)
        start = {k: v.clone() for k,v in learn.model.state_dict().items()}
        with learn.no_bar(), learn.no_logging(): learn.fit_probe(2, lr=6.4, warmup=1)
        runs.append(learn)
    end = [o.model.state_dict() for o in runs]
    assert all(torch.equal(end[0][k], end[1][k]) for k in start) and all(torch.equal(v, before[k]) for k,v in encoder.state_dict().items())
    assert {k for k in start if not torch.equal(start[k], end[0][k])} == {k for k in start if k.startswith('head.')}
    assert not learn.model.vit.training and learn.opt.param_groups[0]['always_adapt'] and encoder.training
    lrs = learn.recorder.lrs
    assert lrs[0] == 0 and max(lrs) == pytest.approx(6.4) and lrs[-1] < 2


def test_what_a_probe_learner_refuses(encoder):
    with pytest.raises(ValueError, match='have no classes'): linear_probe_learner(mim_dls(img_size=32, in_chans=1, num_workers=0, device='cpu'), encoder)
    with pytest.raises(ValueError, match='looks at one block'): FrozenProbe(encoder, 3, block='all')


# beside a training

def labelled(n=60, seed=0):
    g = torch.Generator().manual_seed(seed); y = torch.randint(3, (n,), generator=g)
    return torch.rand(n, 1, 32, 32, generator=g)*.3 + y.reshape(-1, 1, 1, 1)*.3, y


def pretraining(**kw):
    pics = [*labelled(24, 1)[0][:, 0].mul(255).byte().numpy()]
    dls = mim_dls(pics, img_size=32, bs=8, in_chans=1, crops_per_image=1, num_workers=0, device='cpu')
    return mim_learner(dls, 'vit_tiny_patch16_224', method='bootmae', **size, seed=0, **kw)


def quietly(learn, *args, **kw):
    with warnings.catch_warnings(), learn.no_bar(), learn.no_logging(): warnings.simplefilter('ignore'); learn.fit_one_cycle(*args, **kw)
    return learn


def weights(learn): return learn.model.state_dict()
def same(a, b): return all(torch.equal(v, b[k]) for k,v in a.items())


def test_a_probe_changes_nothing_in_a_training():
    alone = quietly(pretraining(), 5, 1e-3)
    cb = ProbeCallback(FeatureProbe(labelled(), labelled(30, 2), k=5), every=2)
    watched = quietly(pretraining(cbs=cb), 5, 1e-3)
    assert same(weights(alone), weights(watched)) and torch.equal(torch.stack(list(alone.recorder.losses)), torch.stack(list(watched.recorder.losses)))
    rows = [list(o) for o in watched.recorder.values]
    assert [r[:-2] for r in rows] == [list(o) for o in alone.recorder.values] and [r[-2] is None for r in rows] == [True, False, True, False, False]
    assert [o['epoch'] for o in cb.log] == [1, 3, 4] and rows[1][-2:] == [cb.log[0]['knn'], cb.log[0]['linear']]
    assert cb.log[-1] == dict(epoch=4, **cb.probe(watched.model)) and watched.recorder.metric_names[-3:-1] == ['knn', 'linear']
    names = [m.name for m in watched.metrics]
    assert 'knn' not in names and names == [m.name for m in alone.metrics]   # the next fit may be without


def test_a_probe_in_a_run_that_goes_on(tmp_path):
    probe = lambda: ProbeCallback(KNNProbe(labelled(), labelled(30, 2), k=5))
    alone = quietly(pretraining(), 4, 1e-3)
    whole = quietly(pretraining(cbs=probe()), 4, 1e-3)

    class Stop(Exception): pass
    class StopAt(Callback):
        order, n = 90, 0
        def after_batch(self):
            if self.training: self.n += 1
            if self.n == 7: raise Stop('now')
    learn = pretraining(cbs=[probe(), StopAt()])
    with pytest.raises(Stop): quietly(learn, 4, 1e-3, cbs=RunState(tmp_path, steps=1))
    learn = pretraining(cbs=probe())
    with warnings.catch_warnings(), learn.no_bar(), learn.no_logging(): warnings.simplefilter('ignore'); learn.resume(tmp_path)
    assert same(weights(alone), weights(whole)) and same(weights(alone), weights(learn))
    assert [list(o) for o in learn.recorder.values] == [list(o) for o in whole.recorder.values] and len(learn.recorder.values) == 4
    bare = pretraining()                                                     # and without: it is no part of the run
    with warnings.catch_warnings(), bare.no_bar(), bare.no_logging(): warnings.simplefilter('ignore'); bare.resume(tmp_path)


def test_what_a_callback_needs():
    with pytest.raises(ValueError, match='every=0'): ProbeCallback(KNNProbe(labelled(), labelled()), every=0)
    with pytest.raises(TypeError, match='does not say what its figures are called'): ProbeCallback(lambda model: {})
