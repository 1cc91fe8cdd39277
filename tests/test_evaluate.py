"""Features that are those of the whole image, a vote that is exact, and nothing left behind: modes, random numbers, loaders."""
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import Normalize
from fastai.vision.data import ImageBlock
from PIL import Image
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bootmae_nb.data import mim_dls
from bootmae_nb.evaluate import KNNProbe, encoder_features, knn_accuracy, knn_predict, nearest, retrieval, retrieval_sheet
from bootmae_nb.labelled import labelled_dls as labelled_folder
from bootmae_nb.learner import mim_learner
from bootmae_nb.models import methods, mim_model
from bootmae_nb.viz import to_stats

size = dict(arch='vit_tiny_patch16_224', patch_size=8, width=48, depth=3, heads=3)
tiny = dict(**size, img_size=(32, 48), seed=0)


def rand(*shape, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
def images(n=5): return rand(n, 3, 32, 48)


# the vote

def naive(train_x, train_y, test_x, k, temperature):
    "One test image at a time, in Python's numbers"
    res = []
    for t in test_x.tolist():
        sims = []
        for i,x in enumerate(train_x.tolist()):
            sims.append((-sum(a*b for a,b in zip(t, x))/math.sqrt(sum(a*a for a in t)*sum(a*a for a in x)), i))
        votes = {}
        for s,i in sorted(sims)[:k]: votes[int(train_y[i])] = votes.get(int(train_y[i]), 0) + math.exp(-s/temperature)
        res.append(max(sorted(votes), key=votes.get))
    return res


@pytest.mark.parametrize('k', [1, 2, 7, 20, 100])
@pytest.mark.parametrize('temperature', [.07, 1.])
def test_the_vote_equals_a_naive_loop(k, temperature):
    g = torch.Generator().manual_seed(k)
    train, test = (torch.randn(n, 6, generator=g, dtype=torch.float64) for n in (60, 40))
    labels = torch.tensor([-3, 0, 12, 5000])[torch.randint(4, (60,), generator=g)]
    want = naive(train, labels, test, k, temperature)
    assert knn_predict(train, labels, test, k, temperature).tolist() == want
    truth = torch.tensor(want); truth[:10] = 99                             # a class that training has not
    assert knn_accuracy(train, labels, test, truth, k, temperature) == .75


def test_the_nearest_come_first_and_chunks_change_nothing():
    train, test = torch.randn(50, 5, dtype=torch.float64), torch.randn(23, 5, dtype=torch.float64)
    sim, idx = nearest(train, test, 9)
    every = torch.cosine_similarity(test[:, None], train[None], dim=2).sort(dim=1, descending=True)
    assert torch.equal(idx, every.indices[:, :9]) and torch.allclose(sim, every.values[:, :9])
    for most in (1, 120, 10**6): assert torch.equal(nearest(train, test, 9, max_values=most)[1], idx)
    assert nearest(train[:4], test, 9)[1].shape == (23, 4)                  # all are neighbours


def test_ties_go_to_the_first_and_to_the_lowest_class():
    train = torch.tensor([[1., 0], [0, 1], [0, 1], [1, 0], [0, 1], [1, 0], [0, 1]])
    sim, idx = nearest(train, torch.tensor([[1., 0], [0, 2.]]), 5)
    assert idx.tolist() == [[0, 3, 5, 1, 2], [1, 2, 4, 6, 0]] and sim.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    for order in ([4, 9], [9, 4]):
        assert knn_predict(torch.tensor([[1., 0], [0, 1]]), torch.tensor(order), torch.tensor([[1., 1]])).item() == 4
    same = torch.ones(30, 4)                                                # a collapsed encoder: the first k of the training images vote
    assert knn_predict(same, torch.arange(30)//12, same, k=12).unique().tolist() == [0]
    assert knn_predict(same, torch.arange(30)//12, same, k=25).unique().tolist() == [0]
    assert knn_predict(same, 2 - torch.arange(30)//15, same, k=25).unique().tolist() == [2]


def test_lengths_do_not_matter_and_temperatures_do_not_overflow():
    train, test, y = torch.randn(40, 8), torch.randn(30, 8), torch.randint(5, (40,))
    want = knn_predict(train, y, test)
    assert torch.equal(knn_predict(train*torch.rand(40, 1).add(.1), y, test*100), want)
    assert torch.equal(knn_predict(train, y, test, temperature=1e-5), y[nearest(train, test, 1)[1][:, 0]])
    assert knn_predict(train.half(), y, test.bfloat16()).eq(want).float().mean() > .9
    assert knn_predict(torch.zeros(3, 2), torch.tensor([1, 2, 2]), torch.zeros(1, 2)).item() == 2


def test_what_cannot_vote():
    x, y = torch.randn(6, 3), torch.arange(6)
    for args, text in [((x, y[:5], x, y), 'training labels'), ((x, y, x, y[:5]), r'test labels .* each of 6 images'), ((x, y.float(), x, y), 'float32'),
                       ((x, y[:, None], x, y), r'shape \(6, 1\)'), ((x, y, x[:, :2], y), '3 values and test features 2'), ((x[0], y[:3], x, y), r'shape \(3,\)'),
                       ((x[:0], y[:0], x, y), 'at least one'), ((x, y, x[:0], y[:0]), 'at least one'), ((x*float('nan'), y, x, y), 'training features hold NaN'),
                       ((x, y, x, y, 0), 'k=0'), ((x, y, x, y, 3, 0.), 'temperature 0.0')]:
        with pytest.raises(ValueError, match=text): knn_accuracy(*args)


# features

@pytest.mark.parametrize('name', list(methods))
@pytest.mark.parametrize('pool', ['mean', 'cls'])
@pytest.mark.parametrize('block', [0, 1, 2, -1, -3])
def test_features_of_a_masked_autoencoder(name, pool, block):
    "The encoder on all patches in the method's statistics, with its norm after the last block only"
    model = mim_model(name, **tiny, drop_path=.5).train()
    x = images()
    f, y = encoder_features(model, x, pool, block, bs=2)
    enc = model.eval().encoder
    with torch.no_grad(): t = enc(to_stats(model, x), keep=(block,))[block]
    if block in (2, -1): t = enc.norm(t)
    want = t[:, 1:].mean(1) if pool == 'mean' else t[:, 0]
    assert y is None and f.shape == (5, 48) and type(f) is torch.Tensor and torch.allclose(f, want, atol=1e-5)


def test_norm_can_be_asked_for():
    model = mim_model('mae', **tiny); x = images(); enc = model.encoder
    enc.vit.norm.weight.data.mul_(3)
    with torch.no_grad(): t = enc(to_stats(model, x), keep=(0, -1))
    assert torch.allclose(encoder_features(model, x, block=0, norm=True)[0], enc.norm(t[0])[:, 1:].mean(1), atol=1e-5)
    assert torch.allclose(encoder_features(model, x, norm=False)[0], t[-1][:, 1:].mean(1), atol=1e-5)


@pytest.mark.parametrize('kw', [dict(), dict(reg_tokens=4), dict(class_token=False, global_pool='avg'), dict(dynamic_img_size=True)])
def test_features_of_a_timm_model(kw):
    vit = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=2, embed_dim=48, num_heads=3, fc_norm=False, **kw)
    mean, std = vit.pretrained_cfg['mean'], vit.pretrained_cfg['std']
    side = 48 if 'dynamic_img_size' in kw else 32
    x = rand(3, 3, side, side)
    with torch.no_grad(): t = vit.eval().forward_features((x - torch.tensor(mean)[:, None, None])/torch.tensor(std)[:, None, None])
    assert torch.allclose(encoder_features(vit, x)[0], t[:, vit.num_prefix_tokens:].mean(1), atol=1e-5)
    if vit.has_class_token: assert torch.allclose(encoder_features(vit, x, 'cls')[0], t[:, 0], atol=1e-5)
    else:
        with pytest.raises(ValueError, match='no class token'): encoder_features(vit, x, 'cls')


def test_blocks_after_the_one_asked_for_do_not_run():
    model, ran = mim_model('mae', **tiny), []
    for i,b in enumerate(model.encoder.vit.blocks): b.register_forward_hook(lambda *a, i=i: ran.append(i))
    encoder_features(model, images(), block=1)
    assert ran == [0, 1]


def test_wrapped_models_and_encoders():
    model = mim_model('mae', **tiny); x = images(); want = encoder_features(model, x)[0]
    class Wrapped(nn.Module):
        def __init__(self, module): super().__init__(); self.module = module
    assert torch.equal(encoder_features(Wrapped(model), x)[0], want)
    assert torch.equal(encoder_features(torch.compile(model, backend='eager'), x)[0], want)
    assert torch.equal(encoder_features(model.encoder, x, stats=(model.method.mean, model.method.std))[0], want)
    assert not torch.allclose(encoder_features(model.encoder, x, stats=((.5,), (.5,)))[0], want, atol=1e-2)
    with pytest.raises(ValueError, match='does not know its input statistics'): encoder_features(model.encoder, x)
    with pytest.raises(TypeError, match='a Linear has no features'): encoder_features(nn.Linear(2, 2), x)


def test_grey_and_four_channels():
    for chans in (1, 4):
        model = mim_model('mae', in_chans=chans, **tiny)
        assert encoder_features(model, rand(2, chans, 32, 48))[0].shape == (2, 48)
        with pytest.raises(ValueError, match=rf'it takes \(B, {chans}, 32, 48\)'): encoder_features(model, images())


def test_statistics_for_other_channels_are_averaged():
    model, x = mim_model('mae', in_chans=4, **tiny), rand(2, 4, 32, 48)
    one, three = ((.2,), (.5,)), ((.1, .2, .3), (.3, .5, .7))
    assert torch.allclose(encoder_features(model, x, stats=three)[0], encoder_features(model, x, stats=one)[0], atol=1e-5)


def test_images_must_be_from_0_to_1():
    model = mim_model('bootmae', **tiny); x = images()
    for bad in (x*2 - 1, x*255, (x*255).byte(), (x > .5).byte()):
        with pytest.raises(ValueError, match='expected floats from 0 to 1'): encoder_features(model, bad)
    assert torch.allclose(encoder_features(model, x*2 - 1, stats=False)[0], encoder_features(model, x)[0], atol=1e-5)
    with pytest.raises(ValueError, match='expected'): encoder_features(model, x[0])
    with pytest.raises(ValueError, match="pool 'max' is unknown"): encoder_features(model, x, 'max')
    with pytest.raises(ValueError, match='block -4 does not exist'): encoder_features(model, x, block=-4)


# loaders

def labelled_dls(n=24, tfms=None):
    "fastai loaders of flat grey images; the label is the shade"
    pics = [np.full((32, 48, 3), 10*i, np.uint8) for i in range(n)]
    block = DataBlock((ImageBlock, CategoryBlock(vocab=list(range(n)))), get_x=lambda i: pics[i], get_y=lambda i: i,
                      splitter=lambda o: (list(range(n - 6)), list(range(n - 6, n))), batch_tfms=tfms)
    return block.dataloaders(list(range(n)), bs=4, num_workers=0, device='cpu')


def test_labels_come_along_in_the_order_of_the_images():
    model, x = mim_model('mae', **tiny), torch.arange(20).reshape(-1, 1, 1, 1).expand(20, 3, 32, 48)/20
    f, y = encoder_features(model, (x, torch.arange(20)))
    assert y.tolist() == list(range(20))
    for data in (DataLoader(TensorDataset(x, torch.arange(20)), 6, shuffle=True), list(zip(x.split(7), torch.arange(20).split(7)))):
        g, z = encoder_features(model, data)
        assert sorted(z.tolist()) == list(range(20)) and torch.allclose(g, f[z], atol=1e-5)
    assert z.tolist() == list(range(20))
    with pytest.raises(ValueError, match='20 images and 3 labels'): encoder_features(model, (x, torch.arange(3)))
    with pytest.raises(ValueError, match=r'labels are torch.int64 of shape \(20, 1\)'): encoder_features(model, (x, torch.arange(20)[:, None]))
    with pytest.raises(ValueError, match='labels are torch.float32'): encoder_features(model, (x, torch.rand(20)))
    with pytest.raises(ValueError, match='holds no images'): encoder_features(model, [])


def test_fastai_loaders():
    model, dls = mim_model('mae', **tiny), labelled_dls()
    shades = torch.arange(24).reshape(-1, 1, 1, 1).expand(24, 3, 32, 48)*10/255
    want = encoder_features(model, shades)[0]
    for dl,own in (dls.train, range(18)), (dls.valid, range(18, 24)):
        f, y = encoder_features(model, dl)
        assert set(y.tolist()) <= set(own) and len(y) >= 6 and type(f) is type(y) is torch.Tensor and torch.allclose(f, want[y], atol=1e-4)
    with pytest.raises(TypeError, match='pass one of them, e.g. dls.train'): encoder_features(model, dls)
    normalised = labelled_dls(tfms=Normalize.from_stats(model.method.mean, model.method.std, cuda=False)).valid
    with pytest.raises(ValueError, match='this loader normalises'): encoder_features(model, normalised)
    assert torch.allclose(encoder_features(model, normalised, stats=False)[0], want[18:], atol=1e-4)
    mim_learner(dls, **size)
    with pytest.raises(ValueError, match='prepared for pretraining'): encoder_features(model, dls.train)


def test_a_training_loader_is_not_disturbed():
    model = mim_model('mae', **size, img_size=32, seed=0)
    dls = mim_dls(img_size=32, bs=8, crops_per_image=1, num_workers=0, seed=3, device='cpu')
    first = encoder_features(model, dls.train)[0]
    assert dls.train.epoch == -1 and torch.equal(encoder_features(model, dls.train)[0], first)
    next(iter(dls.train))
    assert not torch.equal(encoder_features(model, dls.train)[0], first)


# nothing is left behind

class Noisy(torch.utils.data.Dataset):
    "Images that draw from every generator"
    def __len__(self): return 6
    def __getitem__(self, i): return torch.rand(3, 32, 48)*random.random()*np.random.rand(), i % 2


def everything(model): return [m.training for m in model.modules()], random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_modes_and_random_numbers_stay_as_they_were():
    model = mim_model('bootmae', **tiny).train()
    model.decoders.eval(); model.encoder.vit.blocks[1].eval()               # a mixture, as when parts are frozen
    data = DataLoader(Noisy(), 2, shuffle=True)
    before = everything(model); weights = {k: v.clone() for k,v in model.state_dict().items()}
    first = encoder_features(model, data)
    assert everything(model) == before
    random.random(); np.random.rand(); torch.rand(1)                        # elsewhere the program goes on drawing
    before, other = everything(model), encoder_features(model, data)
    assert everything(model) == before and all(torch.equal(first[i], other[i]) for i in (0, 1)) and not first[0].requires_grad
    assert torch.is_grad_enabled() and all(torch.equal(v, weights[k]) for k,v in model.state_dict().items())
    with pytest.raises(ValueError): encoder_features(model, [images(), images()*100])
    with pytest.raises(ValueError): encoder_features(model, DataLoader(Noisy(), 2, collate_fn=lambda b: torch.rand(2, 3, 9, 9)))
    assert everything(model) == before
    probe = KNNProbe(data, data, k=3)
    assert probe(model) == probe(model) and everything(model) == before


def test_fastai_is_not_needed():
    code = "import sys, bootmae_nb.evaluate, bootmae_nb.viz; sys.exit(any(o in sys.modules for o in ('fastai', 'sklearn', 'matplotlib.pyplot')))"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


# the probe

def test_the_probe():
    "Shades of grey are told apart"
    y = (torch.arange(40) > 19).long(); x = (torch.linspace(0, .3, 40) + .7*y).reshape(-1, 1, 1, 1).expand(40, 3, 32, 48)
    model = mim_model('mae', **tiny).train()
    probe = KNNProbe((x[::2], y[::2]), (x[1::2], y[1::2]), k=3)
    assert probe(model) == dict(knn=1.) and model.training and isinstance(probe(model)['knn'], float)
    with pytest.raises(ValueError, match='the test images have no labels'): KNNProbe((x, y), x)(model)
    with pytest.raises(ValueError, match='k=0'): KNNProbe((x, y), (x, y), k=0)


def test_the_probe_passes_its_settings_on(monkeypatch):
    model, calls = mim_model('mae', **tiny), []
    monkeypatch.setattr('bootmae_nb.evaluate.knn_accuracy', lambda *args: calls.append(args) or .25)
    train, test = ((rand(n, 3, 32, 48, seed=n), torch.arange(n)) for n in (5, 4))
    settings = dict(pool='cls', block=1, norm=True, stats=((.1,)*3, (.4,)*3), bs=3)
    assert KNNProbe(train, test, 7, temperature=.5, **settings)(model) == dict(knn=.25)
    a, z, b, w, k, temperature = calls[0]
    assert torch.equal(a, encoder_features(model, train, **settings)[0]) and torch.equal(b, encoder_features(model, test, **settings)[0])
    assert torch.equal(z, train[1]) and torch.equal(w, test[1]) and (k, temperature) == (7, .5)


# against scikit-learn

@pytest.mark.parametrize('k', [1, 5, 20])
def test_the_vote_equals_scikit_learn(k):
    g = torch.Generator().manual_seed(k)
    train, test = (torch.randn(n, 8, generator=g, dtype=torch.float64) for n in (300, 200))
    y = torch.tensor([2, 5, 9])[(train[:, 0] > 0).long() + (train[:, 1] > 0)]
    theirs = KNeighborsClassifier(k, metric='cosine', algorithm='brute', weights=lambda d: np.exp((1 - d)/.07)).fit(train, y)
    assert knn_predict(train, y, test, k).tolist() == theirs.predict(test).tolist()


@pytest.mark.parametrize('max_values', [1, 700, 10**7])
def test_retrieval_equals_scikit_learn(max_values):
    g = torch.Generator().manual_seed(0)
    train, test = (torch.randn(n, 5, generator=g, dtype=torch.float64) for n in (60, 40))
    y, z = (torch.randint(4, (n,), generator=g) for n in (60, 40))
    z[:3] = 77                                                              # a class that is not there
    sim = torch.cosine_similarity(test[:, None], train[None], dim=2)
    found = retrieval(train, y, test, z, ks=(1, 7), max_values=max_values)
    assert found['mAP'] == pytest.approx(np.mean([average_precision_score(y == c, s) for s,c in zip(sim[3:], z[3:])]), abs=1e-6) and found['queries'] == 37
    for k in (1, 7): assert found[f'p@{k}'] == pytest.approx((y[sim.topk(k).indices] == z[:, None]).double().mean().item())
    sim = torch.cosine_similarity(train[:, None], train[None], dim=2)
    own = retrieval(train, y, max_values=max_values)
    rest = [np.delete(np.arange(60), i) for i in range(60)]
    assert own['mAP'] == pytest.approx(np.mean([average_precision_score(y[r] == y[i], sim[i, r]) for i,r in enumerate(rest)]), abs=1e-6) and own['queries'] == 60
    assert own['p@1'] == pytest.approx(np.mean([y[r][sim[i, r].argmax()] == y[i] for i,r in enumerate(rest)]))


def test_what_cannot_be_retrieved():
    x, y = torch.randn(6, 3), torch.arange(6)
    for args,text in [((x, y), 'precision at 10 is asked for, but there are 5'), ((x, y, x, y, (7,)), 'there are 6'), ((x, y, x, y + 9, (1,)), 'no query has an image'),
                      ((x, y[:5]), 'training labels'), ((x, y, x, None, (1,)), 'test_y')]:
        with pytest.raises(ValueError, match=text): retrieval(*args)


def test_a_sheet_of_neighbours():
    shades = torch.linspace(0, 1, 6).reshape(-1, 1, 1, 1).expand(6, 3, 16, 16)
    sheet = np.asarray(retrieval_sheet(shades, shades[:2], torch.tensor([[5, 1, 2], [0, 3, 4]]), torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1]), height=40))
    rows = [sheet[22 + 6 + 24 + i*54] for i in range(2)]
    starts = [np.flatnonzero((r == (0, 114, 178)).all(1)).size // 8 for r in rows], [np.flatnonzero((r == (213, 94, 0)).all(1)).size // 8 for r in rows]
    assert starts == ([2, 2], [1, 1])                                       # two of the class of each query, one of the other
    for kw,text in [(dict(idx=torch.zeros(1, 2).long()), '2 queries and neighbours of 1'), (dict(idx=torch.zeros(2, 2).long(), labels=torch.zeros(6)), 'give both')]:
        with pytest.raises(ValueError, match=text): retrieval_sheet(shades, shades[:2], **kw)


# several blocks

@pytest.mark.parametrize('pool', ['mean', 'cls', 'mean+cls'])
@pytest.mark.parametrize('norm', [None, True, False])
def test_several_blocks_in_one_pass(pool, norm):
    model, ran = mim_model('mae', **tiny), []
    hook = model.encoder.vit.blocks[0].register_forward_hook(lambda *a: ran.append(1))
    for blocks,want in [('all', [0, 1, 2]), ((2, 0), [0, 2]), ((-1,), [2]), ([1, -2], [1])]:
        ran.clear(); found, _ = encoder_features(model, images(), pool, blocks, norm)
        assert list(found) == want and len(ran) == 1
        for b in want: assert torch.equal(found[b], encoder_features(model, images(), pool, b, norm)[0])
    hook.remove()
    both = encoder_features(model, images(), 'mean+cls')[0]
    assert torch.equal(both, torch.cat([encoder_features(model, images(), p)[0] for p in ('mean', 'cls')], 1))
    for bad,text in [((), 'no block is given'), ('last', "block 'last' is unknown"), ((0, 3), 'block 3 does not exist')]:
        with pytest.raises(ValueError, match=text): encoder_features(model, images(), block=bad)


def test_images_of_other_sizes():
    vit = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=2, embed_dim=48, num_heads=3, dynamic_img_size=True)
    assert encoder_features(vit, rand(2, 3, 64, 48), block='all')[0][1].shape == (2, 48)
    with pytest.raises(ValueError, match='multiples of its patches, 16 x 16'): encoder_features(vit, rand(2, 3, 50, 48))
    with pytest.raises(ValueError, match='it takes 3 channels'): encoder_features(vit, rand(2, 1, 64, 48))


# kept on disk

class Counted:
    "A model whose passes are counted"
    def __init__(self, model=None):
        self.model, self.n = model or mim_model('mae', **tiny), 0
        self.model.encoder.vit.blocks[0].register_forward_hook(self.count)
    def count(self, *_): self.n += 1
    def __call__(self, *args, **kw):
        self.n = 0; res = encoder_features(self.model, *args, **kw)
        return res, self.n > 0


def test_what_is_kept_spares_the_pass(tmp_path):
    run, data = Counted(), (images(), torch.arange(5))
    want = encoder_features(run.model, data, block='all')
    for passes in (True, False, False):
        (xs, y), ran = run(data, block='all', cache=tmp_path)
        assert ran == passes and y.tolist() == list(range(5)) and all(torch.equal(xs[b], want[0][b]) for b in xs)
    (x, y), ran = run(data, block=1, cache=tmp_path)
    assert not ran and torch.equal(x, want[0][1]) and len([*tmp_path.iterdir()]) == 3
    assert not run([(data[0], data[1])], block=1, cache=tmp_path)[0][0].isnan().any()
    for n,f in enumerate(sorted(tmp_path.glob('*.safetensors'))):           # damage, also where the file can be read still
        b = bytearray(f.read_bytes()); b[-5] ^= 1; f.write_bytes(b if n else b[:50])
    (xs, y), ran = run(data, block='all', cache=tmp_path)
    assert ran and all(torch.equal(xs[b], want[0][b]) for b in xs) and not run(data, block='all', cache=tmp_path)[1]


def test_whatever_changes_is_computed_anew(tmp_path):
    run, x, y = Counted(), images(), torch.arange(5)
    def new(*args, **kw):
        ran = run(*args, **kw, cache=tmp_path)[1]
        assert not run(*args, **kw, cache=tmp_path)[1]                      # and then it is kept
        return ran
    assert new((x, y))
    assert new(x) and new((x, y + 1)) and new((x*.99, y)) and new((x[:4], y[:4])) and new((x.flip(0), y))
    assert new((x, y), block=0) and new((x, y), pool='cls') and new((x, y), norm=False) and new((x, y), stats=((.4,), (.2,))) and new((x, y), block=0, norm=True)
    assert not run((x, y), cache=tmp_path)[1]
    with torch.no_grad(): run.model.encoder.vit.blocks[2].mlp.fc2.bias[3] += 1e-3
    assert new((x, y))
    run.model.encoder.vit.blocks[1].attn.num_heads *= 2; run.model.encoder.vit.blocks[1].attn.head_dim //= 2; run.model.encoder.vit.blocks[1].attn.scale *= 2**.5
    assert new((x, y))
    with torch.autocast('cpu', torch.bfloat16): assert new((x, y))
    with pytest.raises(ValueError, match='gone through once only'): run(iter([x]), cache=tmp_path)


def test_loaders_are_known_by_their_files(tmp_path, monkeypatch):
    for c in 'ab':
        (tmp_path/'pics'/c).mkdir(parents=True)
        for i in range(6): Image.new('RGB', (48, 32), (40*i, 99, 200*(c == 'a'))).save(tmp_path/'pics'/c/f'{i}.png'); os.utime(tmp_path/'pics'/c/f'{i}.png', (10**9,)*2)
    monkeypatch.setattr('bootmae_nb.data._SETTLED', -1)                     # as if the files had been there for long
    run, read = Counted(), []
    make = lambda **kw: labelled_folder(tmp_path/'pics', (32, 48), **dict(bs=4, num_workers=0, device='cpu', cache=0) | kw)
    from bootmae_nb import data
    was = data.open_image; monkeypatch.setattr(data, 'open_image', lambda *a, **k: read.append(a[0]) or was(*a, **k))
    def ran(dl): read.clear(); return run(dl, cache=tmp_path/'kept')[1]
    dls = make()
    want = run(dls.valid)[0]
    assert ran(dls.valid) and not ran(dls.valid) and not read and not ran(make().valid) and torch.equal(run(make().valid, cache=tmp_path/'kept')[0][0], want[0])
    assert ran(dls.train) and not ran(make().train) and not read
    assert ran(make(resize='squish').valid) and ran(make(seed=1).valid) and ran(make(min_scale=.5).train) and ran(make(flip=False).train)
    next(iter(dls.train)); assert ran(dls.train)                            # the crops of the next epoch
    first = dls.valid_ds.items[0][0]
    st = first.stat(); Image.new('RGB', (48, 32), (1, 2, 3)).save(first)
    assert ran(make().valid) and read
    x = run(make().valid, cache=tmp_path/'kept')[0][0]
    assert not torch.allclose(x[0], want[0][0], atol=1e-3) and torch.equal(x[1:], want[0][1:]) and st.st_mtime_ns != first.stat().st_mtime_ns
    monkeypatch.setattr('bootmae_nb.data._SETTLED', 10**10)                 # all files have only just changed: their content tells
    assert ran(make().valid) and not ran(make().valid) and read


def test_the_order_of_a_loader_is_that_without_a_cache(tmp_path):
    model, data = mim_model('mae', **tiny), DataLoader(Noisy(), 2, shuffle=True)
    want, got = encoder_features(model, data), encoder_features(model, data, cache=tmp_path)
    assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1]) and torch.equal(encoder_features(model, data, cache=tmp_path)[0], want[0])
    before = everything(model); encoder_features(model, data, cache=tmp_path/'new'); assert everything(model) == before


@pytest.mark.cuda
def test_on_a_gpu():
    model, x, y = mim_model('mae', **tiny).cuda(), images(40), torch.arange(40) % 5
    f, z = encoder_features(model, (x, y))
    assert f.device.type == z.device.type == 'cpu' and torch.allclose(f, encoder_features(model.cpu(), x)[0], atol=1e-3)
    assert torch.equal(knn_predict(f.cuda(), y, f, 5).cpu(), knn_predict(f, y, f, 5))
