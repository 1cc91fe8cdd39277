"""Segmentation: it learns, its figures are right, windows and sizes agree, it goes on where it was stopped, and says what is wrong with arguments."""
from functools import cache

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.data.block import DataBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter
from fastai.torch_core import TensorImage, TensorMask
from fastai.vision.data import ImageBlock, MaskBlock, SegmentationDataLoaders
from PIL import Image
from torch import nn

from common import classes, equal, labelled_scenes, quietly, scene_loaders, state
from bootmae_nb.checkpoints import CheckpointError, load_model, save_model, to_authors
from bootmae_nb.data import SeededDL
from bootmae_nb.images import ImageError
from bootmae_nb.label_maps import LabelCodes, segment_dls, segment_items
from bootmae_nb.models import mim_model
from bootmae_nb.runs import ResumeError, RunState
from bootmae_nb.scenes import make_scene, write_scenes
from bootmae_nb.segment import (auto_window, Segmenter, SegmentLoss, SegmentMetric, confusion, evaluate_segmenter, load_segmenter, make_segmenter, map_scales,
                                segment_image, segment_learner, segment_metrics, segment_probs, segment_recipe, segment_recipe_learner, segment_report,
                                window_starts)

tiny = dict(arch='vit_tiny_patch16_224', img_size=32, patch_size=4, width=32, depth=2, heads=2, pixel_width=16)


@cache
def encoder(method='bootmae', **kw): return mim_model(method, seed=0, **dict(tiny) | kw)


def learner(dls=None, enc=None, **kw): return segment_learner(dls or scene_loaders(), enc or encoder(), **dict(channels=16, drop_path=.2, norm='group') | kw)


def exact(items=None, bs=4, times=1):
    "Loaders that show four images as they are, so many times an epoch, and once for validation"
    items = items or labelled_scenes(4); n = times*len(items)
    found = segment_items(items*(times + 1), classes, valid=list(range(n, n + len(items))))
    return segment_dls(found, items[0][1].shape, bs, scale=(1, 1), flip=False, colour=False, max_share=1, device='cpu', num_workers=0)


# ---- it learns

def test_overfits_four_images():
    dls = exact(labelled_scenes(4, (32, 32), side=(26, 30), n=(1, 1)), times=20)
    learn = learner(dls, layer_decay=1., drop_path=0., wd=0., scales=(2, 1, .5, .25), dropout=0., norm='batch', channels=32)
    quietly(learn, 'fit_one_cycle', 4, 1e-2)
    miou = learn.recorder.values[-1][2]
    assert miou > .9 and abs(evaluate_segmenter(learn.model, learn.dls).miou - miou) < 1e-6


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_a_short_fit_lowers_the_loss(precision):
    learn = learner(exact(), precision=precision, drop_path=0.)
    before = quietly(learn, 'validate')[0]
    quietly(learn, 'fit_one_cycle', 6, 4e-3)
    assert learn.recorder.values[-1][1] < .8*before and all(p.dtype == torch.float32 for p in learn.model.parameters())


@pytest.mark.cuda
@pytest.mark.parametrize('precision', ['fp16', 'bf16'])
def test_learns_on_a_gpu_in_half_precision(precision):
    learn = learner(scene_loaders(device='cuda'), precision=precision, drop_path=0.)
    before = quietly(learn, 'validate')[0]
    quietly(learn, 'fit_one_cycle', 6, 4e-3)
    assert learn.recorder.values[-1][1] < .9*before and not learn.finite_guard.skips
    assert segment_image(learn.model, labelled_scenes(1)[0][0], window=24)[0].device.type == 'cpu'


def test_every_weight_but_the_unused_norm_learns():
    learn = learner(drop_path=0.); start = state(learn.model)
    quietly(learn, 'fit_one_cycle', 1, 1e-2)
    still = {k for k,v in learn.model.named_parameters() if torch.equal(v, start[k])}
    assert all('vit.norm.' in k or k.endswith('pos_embed') for k in still), still


def test_frozen_encoder_stays():
    learn = learner(); learn.freeze(); start = state(learn.model)
    quietly(learn, 'fit_one_cycle', 1, 1e-2)
    assert not any(k.startswith('encoder.') and not torch.equal(v, start[k]) for k,v in learn.model.state_dict().items())
    assert not torch.equal(start['head.classify.1.weight'], learn.model.head.classify[1].weight)


def test_layers_have_their_learning_rates():
    learn = learner(layer_decay=.5); learn.create_opt()
    learn.opt.set_hyper('lr', 1.); seen = []
    learn.opt.opt.step = lambda closure=None: seen.append([g['lr'] for g in learn.opt.opt.param_groups])
    learn.opt.step()
    assert seen[0] == [.125, .125, .25, .25, .5, .5, 1., 1.]


def test_accumulated_gradients_are_those_of_the_larger_batch():
    def run(bs, **kw):
        learn = learner(exact(bs=bs), drop_path=0., dropout=0., **kw)
        quietly(learn, 'fit', 2, 1e-3)
        return learn.model
    one,two = run(4), run(2, cbs=GradientAccumulation(4))
    a,b = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (one, two))
    assert (a - b).abs().max() < 1e-4
    other = torch.cat([p.detach().flatten() for p in run(2).parameters()])
    assert (a - other).abs().max() > 1e-3


# ---- the model

@pytest.mark.parametrize('patch', [4, 8, 16])
@pytest.mark.parametrize('norm', ['group', 'batch'])
def test_any_size_and_the_gradient_reaches_everything(patch, norm):
    model = make_segmenter(encoder(patch_size=patch), classes, norm=norm, channels=16).train()
    out = model(torch.randn(2, 3, 37, 50))
    assert {k: tuple(v.shape) for k,v in out.items()} == dict(main=(2, 3, 37, 50), aux=(2, 3, 37, 50))
    sum(o.square().sum() for o in out.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for size in ((3, 5), (64, 16), (1, 1)): assert model.eval()(torch.randn(1, 3, *size)).shape == (1, 3, *size)


def test_maps_have_the_papers_strides():
    model = make_segmenter(encoder(patch_size=16), classes, channels=16)
    assert map_scales((16, 16)) == (4, 2, 1, .5) and model.task['scales'] == [4, 2, 1, .5]
    maps = [f(torch.randn(1, 32, 4, 6)).shape[-2:] for f in model.rescale]
    assert [tuple(o) for o in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_one_image_has_no_say_in_another_with_group_norm():
    model = make_segmenter(encoder(), classes, dropout=0., drop_path=0., channels=16).train()
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(model(x)['main'][:1], model(x[:1])['main'], atol=1e-5)
    batch = make_segmenter(encoder(), classes, dropout=0., drop_path=0., channels=16, norm='batch').train()
    assert not torch.allclose(batch(x)['main'][:1], batch(torch.stack([x[0], x[0]]))['main'][:1], atol=1e-3)


def test_sources(tmp_path, monkeypatch):
    enc = encoder()
    torch.save(dict(model=to_authors(enc)), tmp_path/'theirs.pth')
    vit = timm.create_model('vit_tiny_patch16_224', depth=2, num_classes=0)
    for source in (enc, enc.encoder, save_model(enc, tmp_path/'ours'), vit):
        model = make_segmenter(source, classes, channels=16, stats=((.5,)*3, (.5,)*3) if source is enc.encoder else None)
        assert model.eval()(torch.randn(1, 3, 40, 24)).shape == (1, 3, 40, 24)
    assert torch.equal(make_segmenter(enc, classes).encoder.vit.blocks[1].mlp.fc1.weight, enc.encoder.vit.blocks[1].mlp.fc1.weight)
    swin = timm.create_model('swin_tiny_patch4_window7_224', embed_dim=24, depths=(1, 1), num_heads=(1, 1))
    with pytest.raises(ValueError, match='not a plain vision transformer'): make_segmenter(swin, classes)
    monkeypatch.setattr(nn.init, 'kaiming_uniform_', lambda t, **kw: t)               # 30 M numbers need not be drawn
    assert make_segmenter(mim_model('mae', 'vit_base_patch16_224', depth=1, pixel_depth=1), classes).task['channels'] == 512


def test_the_authors_weights_are_a_source(tmp_path):
    big = mim_model('mae', seed=0, patch_size=16, **{k: v for k,v in tiny.items() if k not in ('patch_size', 'width', 'heads', 'pixel_width')} | dict(width=64, heads=1),
                    pixel_depth=1, pixel_width=32, pixel_heads=1)
    torch.save(dict(model=to_authors(big)), tmp_path/'mae.pth')
    model = make_segmenter(str(tmp_path/'mae.pth'), classes, channels=16)
    assert torch.equal(model.encoder.vit.blocks[0].attn.qkv.weight, big.encoder.vit.blocks[0].attn.qkv.weight)


def test_the_packaged_model_is_a_source():
    model = make_segmenter('packaged', classes).eval()
    assert (model.task['channels'], model.task['scales']) == (128, [2, 1, .5, .25])
    assert segment_image(model, make_scene(0).image)[0].shape == (96, 128)


@pytest.mark.parametrize('chans', [1, 2, 4, 5])
def test_other_channels(chans):
    g = torch.Generator().manual_seed(0)
    items = [(TensorImage(torch.rand(chans, 16, 24, generator=g)), TensorMask(torch.randint(0, 3, (16, 24), generator=g))) for _ in range(4)]
    dls = DataLoaders(*(SeededDL(items, bs=2, shuffle=s, num_workers=0, device='cpu') for s in (True, False)), device='cpu')
    learn = learner(dls, vocab=classes)
    quietly(learn, 'fit', 1)
    assert learn.model.in_chans == chans and learn.predict(torch.rand(chans, 20, 30))[0].shape == (20, 30)
    assert 0 <= evaluate_segmenter(learn.model, learn.dls).miou <= 1


def test_save_load_and_what_a_file_tells(tmp_path):
    learn = learner(scene_loaders(ignore='one', crop=24, side=40), palette=[[1, 2, 3], [4, 5, 6]])
    path = save_model(learn.model, tmp_path/'model')
    again = load_segmenter(path)
    assert isinstance(again, Segmenter) and equal(state(again), state(learn.model)) and not again.training
    assert (again.vocab, again.codes, again.palette.tolist()) == (['ground', 'zero'], LabelCodes(('ground', 'zero'), (0, 1), (2, 255)), [[1, 2, 3], [4, 5, 6]])
    assert (again.task['side'], again.task['crop'], again.method.mean) == (40, [24, 24], learn.model.method.mean)
    with pytest.raises(CheckpointError, match='load_segmenter'): load_model(path)
    with pytest.raises(CheckpointError, match='without heads'): load_segmenter(save_model(encoder(), tmp_path/'encoder'))


def test_heads_are_kept():
    first = make_segmenter(encoder(), classes, channels=16, norm='batch')
    second = make_segmenter(first, classes, keep_head=True, seed=5)
    assert equal(state(first), state(second)) and second.task['norm'] == 'batch'
    assert not torch.equal(make_segmenter(first, classes, channels=16, seed=5).head.classify[1].weight, first.head.classify[1].weight)
    with pytest.raises(ValueError, match='classes are not these'): make_segmenter(first, ['a', 'b', 'c'], keep_head=True)
    with pytest.raises(ValueError, match='no heads for segmentation'): make_segmenter(encoder(), classes, keep_head=True)


# ---- a run repeats itself and goes on

def test_runs_are_alike_whatever_happened_before_and_seeds_differ():
    def run(seed=None):
        torch.rand(3); np.random.rand()
        learn = learner(scene_loaders(), seed=seed); quietly(learn, 'fit_one_cycle', 1, 1e-3)
        return state(learn.model)
    first = run()
    assert equal(first, run()) and not equal(first, run(seed=4))


class Stop(Callback):
    order = 99
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.training and self.train_iter == self.at: self.learn.run_state.stop()


@pytest.mark.parametrize('more', [{}, dict(precision='bf16'), dict(accumulate=4)])
def test_resume_gives_the_weights_of_a_run_that_was_not_stopped(tmp_path, more):
    more = dict(more); n = more.pop('accumulate', None)
    def make(where, *cbs): return learner(scene_loaders(), cbs=[RunState(tmp_path/where, best='miou'), *([GradientAccumulation(n)] if n else []), *cbs], **more)
    whole = make('a'); quietly(whole, 'fit_one_cycle', 3, 2e-3)
    stopped = make('b', Stop(4))
    with pytest.raises(KeyboardInterrupt): quietly(stopped, 'fit_one_cycle', 3, 2e-3)
    again = make('b'); quietly(again, 'resume', tmp_path/'b')
    assert equal(state(whole.model), state(again.model)) and [*map(list, whole.recorder.values)][-1][:5] == list(again.recorder.values[-1])[:5]
    assert isinstance(load_segmenter(tmp_path/'b'/'best.safetensors'), Segmenter)
    with pytest.raises(ResumeError, match='aux: 0.4 -> 0.2'): quietly(learner(scene_loaders(), aux=.2, cbs=RunState(tmp_path/'b'), **more), 'resume', tmp_path/'b')
    other = scene_loaders(scale=(1, 1))
    with pytest.raises(ResumeError, match='CropPair'): quietly(learner(other, cbs=RunState(tmp_path/'b'), **more), 'resume', tmp_path/'b')


def test_the_papers_schedule():
    learn = learner()
    quietly(learn, 'fit_paper', 5, 1e-4, warmup=.2)
    lrs,top = np.array(learn.recorder.lrs), 1e-4*2/16
    n = len(lrs); p = np.arange(n)/n
    assert np.allclose(lrs, top*(1 - p)*np.minimum(1, p/.2), atol=1e-9) and lrs.argmax() == n//5
    quietly(learn, 'fit_paper', 2, 1e-4, warmup=0., power=2.)
    assert np.allclose(learn.recorder.lrs, top*(1 - np.arange(6)/6)**2, atol=1e-9)
    r = segment_recipe('bootmae_base_segment')
    assert (r.base_lr, r.layer_decay, r.steps, r.crop, r.drop_path) == (4e-4, .65, 160_000, 512, .1)
    learn = segment_recipe_learner(scene_loaders(), encoder(), 'bootmae_base_segment', channels=16)
    assert learn.lr == 5e-5 and isinstance(learn.model.head.fuse[1], nn.BatchNorm2d)
    quietly(learn, 'fit_recipe', segment_recipe(r, steps=2, warmup_steps=1))
    assert len(learn.recorder.values) == 6, '32 images are seen, 6 in an epoch'


# ---- figures

def naive(pred, targ, n):
    iou,acc = [], []
    for c in range(n):
        p,t = (pred == c) & (targ != 255), targ == c
        if (p | t).any(): iou.append((p & t).sum()/(p | t).sum())
        if t.any(): acc.append((p & t).sum()/t.sum())
    return np.mean(iou), ((pred == targ) & (targ != 255)).sum()/(targ != 255).sum(), np.mean(acc), len(iou)


@pytest.mark.parametrize('missing', [(), (2,), (0, 3)])
def test_figures_are_those_of_a_naive_count(missing):
    g = np.random.default_rng(0)
    present = [c for c in range(5) if c not in missing]
    targ,pred = g.choice([*present, 255], (3, 20, 30)), g.choice(present, (3, 20, 30))
    metrics = segment_metrics(5)
    for m in metrics: m.reset()
    class Fake: pass
    for p,t in zip(pred, targ):
        f = Fake(); f.pred,f.y = F.one_hot(torch.tensor(p)[None], 5).permute(0, 3, 1, 2).float(), TensorMask(torch.tensor(t)[None])
        for m in metrics: m.accumulate(f)
    want = naive(pred, targ, 5)
    assert np.allclose([m.value for m in metrics], want[:3])
    r = segment_report(confusion(torch.tensor(pred), torch.tensor(targ), 5), list('abcde'))
    assert np.allclose((r.miou, r.accuracy, r.class_accuracy), want[:3]) and r.absent == ['abcde'[i] for i in missing]
    assert all(o in str(r) for o in ('left out', 'nowhere')) or not missing


def test_a_class_that_is_predicted_and_not_there_counts_as_zero():
    r = segment_report(confusion(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 0]]]), 3), ['a', 'b', 'c'])
    assert (r.miou, r.absent, r.classes[1]['accuracy']) == (.25, ['c'], None)


def test_the_learner_and_the_evaluation_agree_at_images_of_several_sizes(tmp_path):
    items = labelled_scenes(3) + labelled_scenes(2, (40, 24), 10) + labelled_scenes(2, (33, 45), 20)
    learn = learner(scene_loaders(items, valid=(2, 3, 5, 6)))
    assert learn.dls.valid.bs == 1
    learn.model.eval()
    figures = quietly(learn, 'validate')
    r = evaluate_segmenter(learn.model, learn.dls)
    assert np.allclose(figures[1:], (r.miou, r.accuracy, r.class_accuracy)) and r.images == 4
    truth = [items[i] for i in (2, 3, 5, 6)]
    pred,targ = (np.concatenate([o.ravel() for o in os]) for os in ([segment_image(learn.model, im)[0].numpy() for im,_ in truth], [y for _,y in truth]))
    assert np.allclose((r.miou, r.accuracy, r.class_accuracy), naive(pred, targ, 3)[:3])
    assert np.isclose(evaluate_segmenter(learn.model, truth).miou, r.miou)
    path = r.save(tmp_path/'r.json'); assert '"miou"' in path.read_text() and '| ground |' in r.markdown()


def test_evaluation_is_at_the_size_of_the_label_maps():
    learn = learner(scene_loaders(labelled_scenes(4, (64, 96)), valid=(2, 3), side=32))
    assert learn.dls.valid.one_batch()[0].shape[2:] == (32, 48)
    r = evaluate_segmenter(learn.model, learn.dls)
    assert sum(o['pixels'] for o in r.classes) == pytest.approx(1) and r.about['side'] == 32
    want = segment_report(sum(confusion(segment_image(learn.model, im)[0][None], torch.tensor(y)[None].long(), 3) for im,y in labelled_scenes(4, (64, 96))[2:]), classes)
    assert r.miou == pytest.approx(want.miou)


def test_data_with_other_numbers_for_the_same_classes(model):
    items = labelled_scenes(4); want = evaluate_segmenter(model, items)
    found = segment_items([(im, y + 1) for im,y in items], classes, reduce_zero=True, valid=[1, 3])
    assert found.codes.values == (1, 2, 3) != model.codes.values
    shown = [evaluate_segmenter(model, data) for data in (found, segment_dls(found, 24, 2, device='cpu', num_workers=0), items[1::2])]
    assert [o.classes for o in shown] == [shown[2].classes]*3 and want.images == 4 and shown[0].images == 2


def test_ignored_pixels_have_no_say_in_loss_and_figures():
    x,y = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))
    z = y.clone(); z[:, 2:] = 255; other = x.clone(); other[:, :, 2:] += torch.randn(1, 3, 2, 4)
    assert torch.equal(SegmentLoss()(x, z), SegmentLoss()(other, z)) and torch.equal(confusion(x, z, 3), confusion(other, z, 3))
    assert torch.allclose(SegmentLoss()(x, z), F.cross_entropy(x[:, :, :2], y[:, :2]))
    loss = SegmentLoss(weights=[1., 1., 5.])((x.requires_grad_(), x), torch.full_like(y, 255)); loss.backward()
    assert loss == 0 and not x.grad.any()


# ---- inference

@pytest.fixture(scope='module')
def model(): return make_segmenter(encoder(), classes, channels=16).eval()


def test_a_window_that_covers_the_image_is_the_image(model):
    x = torch.randn(2, 3, 30, 44); whole = segment_probs(model, x)
    for window in ((30, 44), 44, 500): assert torch.allclose(segment_probs(model, x, window=window), whole, atol=1e-6)
    assert torch.allclose(whole, model(x).softmax(1), atol=1e-6)


def test_windows_are_averaged_where_they_overlap(model):
    x = torch.randn(1, 3, 24, 40); total,n = torch.zeros(1, 3, 24, 40), torch.zeros(24, 40)
    for a in (0, 8):
        for b in (0, 12, 24):
            total[..., a:a + 16, b:b + 16] += model(x[..., a:a + 16, b:b + 16]).softmax(1); n[a:a + 16, b:b + 16] += 1
    for bs in (1, 4): assert torch.allclose(segment_probs(model, x, window=16, stride=(8, 12), bs=bs), total/n, atol=1e-6)
    assert n.min() == 1 and window_starts(41, 16, 12) == [0, 12, 24, 25]


def test_sizes_and_mirrors_are_averaged(model):
    x = torch.randn(1, 3, 24, 32)
    small = F.interpolate(x, (12, 16), mode='bilinear', antialias=True)
    back = lambda p: F.interpolate(p, (24, 32), mode='bilinear')
    want = model(x).softmax(1) + model(x.flip(-1)).softmax(1).flip(-1) + back(model(small).softmax(1)) + back(model(small.flip(-1)).softmax(1).flip(-1))
    assert torch.allclose(segment_probs(model, x, scales=(1, .5), flip=True), want/4, atol=1e-5)


@pytest.mark.parametrize('wrong', [dict(window=0), dict(stride=4), dict(window=8, stride=9), dict(scales=()), dict(scales=(0,)), dict(window=(1, 2, 3))])
def test_what_is_no_way_to_look(model, wrong):
    with pytest.raises(ValueError, match='give|larger than'): segment_probs(model, torch.randn(1, 3, 16, 16), **wrong)


def test_any_kind_of_image_at_its_own_size(model, tmp_path):
    im = Image.fromarray(make_scene(1, size=(50, 70)).image); im.save(tmp_path/'a.png')
    x = torch.from_numpy(np.asarray(im).copy()).permute(2, 0, 1)/255
    labels,sure = segment_image(model, tmp_path/'a.png')
    assert labels.shape == sure.shape == (50, 70) and 1/3 <= sure.min() and sure.max() <= 1
    for o in (im, np.asarray(im), x, TensorImage(x)): assert torch.equal(segment_image(model, o)[0], labels)
    for side in (16, 100): assert segment_image(model, im, side=side)[0].shape == (50, 70)
    with pytest.raises(ValueError, match='is no image for this model'): segment_image(model, x[:2])
    with pytest.raises(ImageError, match='does not exist'): segment_image(model, tmp_path/'b.png')


# ---- loaders of others and arguments

def test_crops_are_filled_with_the_mean_of_the_model():
    learn = learner(scene_loaders())
    assert learn.dls.train.after_item.fs[0].fill == tuple(round(255*o) for o in learn.model.method.mean)


def test_own_fastai_loaders(tmp_path):
    folder = write_scenes(tmp_path, 6, 1, size=(32, 48), digits=(0, 1))
    files = sorted((folder/'train'/'images').iterdir())
    label = lambda p: folder/'train'/'labels'/p.name
    codes = ['background', 'digit 0', 'digit 1']
    a = SegmentationDataLoaders.from_label_func(folder, files, label, .3, 0, codes, bs=2, num_workers=0, device=torch.device('cpu'))
    block = DataBlock((ImageBlock, MaskBlock(codes)), splitter=IndexSplitter([0, 1]), get_y=label)
    for dls in (a, block.dataloaders(files, bs=2, num_workers=0, device=torch.device('cpu'))):
        learn = learner(dls, ignore='background')
        assert learn.model.vocab == ['digit 0', 'digit 1'] and set(learn.dls.train.one_batch()[1].unique().tolist()) <= {0, 1, 255}
        quietly(learn, 'fit', 1)
        assert learn.show_results().width > 200
    few = SegmentationDataLoaders.from_label_func(folder, files, label, .3, 0, codes[:2], bs=2, num_workers=0, device=torch.device('cpu'))
    with pytest.raises(Exception, match='has the number 2 at'): learner(few)


@pytest.mark.parametrize('kw,says', [
    (dict(layer_decay=0.), 'layer_decay'), (dict(precision='int8'), 'precision'), (dict(weights=[1.]), '1 weights for 3'), (dict(norm='layer'), 'norm='),
    (dict(scales=(1, 2)), 'scales='), (dict(palette=[[0, 0, 0]]), 'palette'), (dict(ignore=3), 'to segment_dls')])
def test_arguments_of_the_learner(kw, says):
    with pytest.raises(ValueError, match=says): learner(**kw)
    with pytest.raises(ValueError, match='two or more images'): learner(scene_loaders(bs=1), norm='batch')


def test_other_classes_are_no_test_for_a_model(model):
    with pytest.raises(ValueError, match='the same classes'): evaluate_segmenter(model, scene_loaders(vocab=['a', 'b', 'c']))


# ---- pictures

def test_pictures():
    learn = learner()
    a,b,c = learn.show_batch(), learn.show_results(), learn.show_results(max_n=1, ds_idx=0, flip=True)
    assert a.width < b.width and c.height < b.height and all(o.mode == 'RGB' for o in (a, b, c))


def test_metric_alone():
    with pytest.raises(ValueError, match='unknown'): SegmentMetric('dice')
    learn = learner(metrics=SegmentMetric('accuracy', 3))
    f = quietly(learn, 'validate')
    assert f[2] == f[4]


def test_large_images_go_through_a_window_by_themselves(model, monkeypatch):
    seen = []
    real = type(model).forward
    monkeypatch.setattr(type(model), 'forward', lambda self, x: seen.append(tuple(x.shape[-2:])) or real(self, x))
    ph,pw = model.patch_size
    x = torch.randn(1, model.in_chans, 65*ph, 64*pw)
    monkeypatch.setitem(model.config['task'], 'crop', [16*ph, 20*pw])
    p = segment_probs(model, x)
    assert p.shape[-2:] == x.shape[-2:] and set(seen) == {(16*ph, 20*pw)} and auto_window(model, (64*ph, 64*pw)) is None
    seen.clear()
    segment_probs(model, x[..., :2*ph, :]); segment_probs(model, x[..., :40*ph, :40*pw], window=None)
    assert set(seen) == {(2*ph, 64*pw), (40*ph, 40*pw)}


def test_maps_are_standardised_by_the_first_batch_and_stay_so(model, tmp_path):
    from bootmae_nb.dense import feature_maps, pyramid_blocks
    m = make_segmenter(model, model.vocab).eval()
    x = 3*torch.randn(4, m.in_chans, 32, 48) + 1
    m.measure(x)
    with torch.no_grad():
        for s,o in zip(m.standard, feature_maps(m.encoder, x, pyramid_blocks(m.encoder.depth))):
            assert s(o).mean((0, 2, 3)).abs().max() < 1e-3 and (s(o).std((0, 2, 3)) < 1.01).all() and s(o).std((0, 2, 3)).median() > .98
    before = [b.clone() for b in m.standard.buffers()]
    m.train()(x)
    again = load_segmenter(save_model(m, tmp_path/'m'))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a,b,c in zip(before, m.standard.buffers(), again.standard.buffers()))


def test_the_norm_of_the_heads_follows_the_batch():
    def kinds(bs, **kw):
        head = segment_learner(exact(bs=bs), encoder(), channels=16, **kw).model.head
        return {type(m).__name__ for m in head.modules() if 'Norm' in type(m).__name__}
    assert kinds(bs=4) == {'BatchNorm2d'} and kinds(bs=3) == {'GroupNorm'} and kinds(bs=4, norm='group') == {'GroupNorm'} and kinds(bs=2, norm='batch') == {'BatchNorm2d'}
