"""Fine-tuning: it learns digits, its learning rates are the papers', it repeats itself, goes on where it was stopped, and says what is wrong."""
import copy
import math

import numpy as np
import pytest
import timm
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders, Datasets
from fastai.data.transforms import Categorize, IntToFloatTensor, Normalize, ToTensor
from fastai.torch_core import TensorImage
from fastai.learner import load_learner
from fastai.vision.augment import Resize
from fastai.vision.core import PILImage, PILImageBW
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from common import equal, quietly, state
from test_distributed import close, shared, together
from bootmae_nb.checkpoints import load_model, save_model, to_authors, to_timm
from bootmae_nb.data import SeededDL, mim_dls, seeded
from bootmae_nb.finetune import (AverageWeights, Classifier, MixBatch, RandAugment, average_decay, classify, finetune_learner, finetune_recipe,
                                 finetune_recipe_learner, finetune_recipes, layer_groups, load_classifier, make_classifier)
from bootmae_nb.learner import mim_learner
from bootmae_nb.models import mim_model
from bootmae_nb.runs import ResumeError, RunState, find_state
from bootmae_nb.vit import make_encoder

tiny = dict(arch='vit_tiny_patch16_224', img_size=16, patch_size=4, width=32, depth=2, heads=2)


def encoder(method='bootmae', **kw): return mim_model(method, seed=0, **dict(tiny, pixel_width=16) | kw)


def tensors(n=48, chans=3, size=16, classes=3, seed=0):
    "Images whose class is their brightness, as tensors with labels"
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = (y/classes)[:, None, None, None] + .3*torch.rand(n, chans, size, size, generator=g)
    return [(TensorImage(a), int(b)) for a,b in zip(x, y)]


def loaders(items=None, bs=8, n_valid=16, **kw):
    items = items or tensors()
    train,valid = (SeededDL(o, bs=bs, num_workers=0, shuffle=s, drop_last=s, device='cpu', seed=3) for o,s in ((items, True), (items[:n_valid], False)))
    return DataLoaders(train, valid, device='cpu')


def learner(enc=None, dls=None, **kw):
    return finetune_learner(dls or loaders(), enc or encoder(), **dict(vocab=['dark', 'grey', 'light'], drop_path=.2) | kw)


strong = dict(mixup=.8, cutmix=1., erasing=.5, ema=.9)


# ---- it learns

def digits(chans=1, size=16):
    x,y = load_digits(return_X_y=True)
    kind = PILImage if chans == 3 else PILImageBW
    images = [kind(Image.fromarray((o.reshape(8, 8)*255/16).astype('uint8')).resize((size, size), Image.BICUBIC).convert('RGB' if chans == 3 else 'L')) for o in x]
    order = [int(o) for o in np.random.default_rng(0).permutation(len(x))]
    return images, y, (order[:1400], order[1400:])


def digit_dls(chans=1, size=16, bs=50, n=None):
    images,y,(train,valid) = digits(chans, size)
    ds = Datasets(range(len(images)), [[lambda i: images[i]], [lambda i: f'digit {y[i]}', Categorize()]], splits=[train[:n], valid])
    return ds.dataloaders(bs=bs, num_workers=0, after_item=[ToTensor()], after_batch=[IntToFloatTensor()], device='cpu')


@pytest.mark.parametrize('chans', [1, pytest.param(3, marks=pytest.mark.slow)])
def test_digits_from_scratch(chans):
    images,y,(_,valid) = digits(chans)
    enc = mim_model('bootmae', 'vit_tiny_patch16_224', img_size=16, in_chans=chans, patch_size=4, width=64, depth=3, heads=4, mlp_ratio=2., pixel_width=32, seed=0)
    learn = finetune_learner(digit_dls(chans, bs=25), enc, layer_decay=1., drop_path=0.)
    quietly(learn, 'fit_one_cycle', 9, 4e-3)
    assert learn.recorder.values[-1][-1] > .95
    label,p = classify(learn.model, images[valid[0]])
    assert label == f'digit {y[valid[0]]}' and label == learn.predict(valid[0])[0] and torch.allclose(p, learn.predict(valid[0])[1], atol=1e-5)


@pytest.mark.slow
def test_digits_after_a_pretraining_and_with_the_defaults():
    images,_,(train,_) = digits(1)
    dls = mim_dls([images[i] for i in train], img_size=16, in_chans=1, bs=50, crops_per_image=1, min_scale=.6, flip=False, num_workers=0, device='cpu')
    pre = mim_learner(dls, 'vit_tiny_patch16_224', 'bootmae', patch_size=4, width=64, depth=3, heads=4, mlp_ratio=2., pixel_width=32, ema='run')
    quietly(pre, 'fit_one_cycle', 20, 4e-3)
    learn = finetune_learner(digit_dls(1), pre.model)
    quietly(learn, 'fit_one_cycle', 8, 4e-3)
    assert learn.recorder.values[-1][-1] > .94


def test_fine_tune_freezes_then_trains_all():
    learn = learner(); start = state(learn.model)
    class Frozen(Callback):
        def before_batch(self):
            if self.training: self.learn.seen.append([n for n,p in self.model.named_parameters() if p.requires_grad])
    learn.seen = []
    quietly(learn, 'fine_tune', 2, 1e-2, cbs=Frozen())
    head = {f'encoder.vit.{o}' for o in ('fc_norm.weight', 'fc_norm.bias', 'head.weight', 'head.bias')}
    n = len(learn.dls.train)
    assert all(set(o) == head for o in learn.seen[:n]) and all(set(o) == set(dict(learn.model.named_parameters())) for o in learn.seen[n:])
    assert not any(torch.equal(v, start[k]) for k,v in learn.model.state_dict().items()), 'positions too'
    learn.freeze_to(-2)
    assert {n.split('.')[3] for n,p in learn.model.named_parameters() if p.requires_grad and 'blocks' in n} == {'1'}


def test_with_the_encoder_frozen_it_stays_to_the_bit():
    learn = learner(); learn.freeze(); start = state(learn.model)
    quietly(learn, 'fit_one_cycle', 1, 1e-2)
    moved = {k.split('.')[2] for k,v in learn.model.state_dict().items() if not torch.equal(v, start[k])}
    assert moved == {'fc_norm', 'head'}


# ---- learning rates of layers

def naive(name, depth, decay):
    "The papers' rule, written out"
    if 'patch_embed' in name or 'pos_embed' in name or 'cls_token' in name: layer = 0
    elif 'blocks' in name: layer = int(name.split('blocks.')[1].split('.')[0]) + 1
    else: layer = depth + 1
    return decay**(depth + 1 - layer)


@pytest.mark.parametrize('pool', ['mean', 'cls'])
def test_every_parameter_of_vit_b_has_its_factor_and_its_decay(pool):
    with torch.device('meta'): vit = timm.create_model('vit_base_patch16_224', num_classes=10, **dict(mean=dict(global_pool='avg', fc_norm=True), cls={})[pool])
    with torch.device('meta'): enc = make_encoder('vit_base_patch16_224')
    enc.vit = vit
    holder = nn.Module(); holder.encoder = enc
    groups,name = layer_groups(holder), {id(p): n for n,p in vit.named_parameters()}
    opt = finetune_opt(groups, .65)
    opt.set_hypers(wd=.05)
    seen = {name[id(p)]: (f, h['wd']) for g,f,h in zip(opt.param_lists, opt.factors, opt.hypers) for p in g}
    assert seen.keys() == {*name.values()} and len(seen) > 150
    for n,p in vit.named_parameters():
        assert seen[n][0] == pytest.approx(naive(n, 12, .65), rel=1e-12), n
        assert seen[n][1] == (0 if p.ndim == 1 or n in ('cls_token', 'pos_embed') else .05), n
    assert seen['head.weight'][0] == 1 and seen['blocks.11.mlp.fc1.weight'][0] == pytest.approx(.65) and seen['pos_embed'][0] == pytest.approx(.65**13)


def finetune_opt(groups, decay):
    from bootmae_nb.finetune import LayerOptim
    return LayerOptim(groups, torch.optim.AdamW, decay, lr=1e-3)


class Steps(Callback):
    "What each layer was multiplied with in each step: SGD without momentum moves by rate x gradient"
    order = 70
    def before_fit(self): self.lrs,self.wds,self.ratios = [], [], []
    def before_step(self): self.old = {n: (p.detach().clone(), p.grad.clone()) for n,p in self.model.named_parameters() if p.requires_grad}
    def after_step(self):
        self.lrs.append([o['lr'] for o in self.opt.hypers]); self.wds.append([o['wd'] for o in self.opt.hypers])
        self.ratios.append({n: ((p0 - p)*g).sum().item()/g.square().sum().item()
                            for n,p in self.model.named_parameters() if n in self.old for p0,g in [self.old[n]] if g.square().sum() > 0})


def sgd_learner(decay=.5, **kw):
    from functools import partial
    from bootmae_nb.finetune import LayerOptim
    learn = learner(layer_decay=decay, wd=0., cbs=Steps(), **kw)
    learn.opt_func = partial(LayerOptim, opt=torch.optim.SGD, layer_decay=decay)
    for p in learn.model.encoder.vit.head.parameters(): nn.init.normal_(p)          # so that gradients reach the encoder
    learn.add_cb(NoMom())
    return learn


class NoMom(Callback):
    "SGD without momentum, whatever a schedule says"
    order = 61
    def before_batch(self):
        if 'mom' in self.opt.hypers[0]: self.opt.set_hyper('mom', 0.)


@pytest.mark.parametrize('fit', ['fit', 'fit_one_cycle', 'fit_paper', 'slice', 'accumulated'])
def test_each_parameter_moves_by_its_own_rate(fit):
    learn = sgd_learner()
    if fit == 'fit': quietly(learn, 'fit', 1, .1)
    elif fit == 'fit_one_cycle': quietly(learn, 'fit_one_cycle', 1, .1)
    elif fit == 'slice': quietly(learn, 'fit_one_cycle', 1, slice(1e-5, .1))
    elif fit == 'accumulated': quietly(learn, 'fit_one_cycle', 1, .1, cbs=GradientAccumulation(16))
    else: quietly(learn, 'fit_paper', 1, .1*256/8, warmup=.5, floor=.1)
    s = learn.steps
    assert len(s.lrs) == (3 if fit == 'accumulated' else 6)
    for lrs,ratios in zip(s.lrs, s.ratios):
        assert len(set(lrs)) == 1 and lrs[0] <= .1
        if lrs[0] < 1e-3: continue
        for n,r in ratios.items(): assert r == pytest.approx(lrs[0]*naive(n, 2, .5), rel=2e-2), n
    tops = [o[0] for o in s.lrs]
    if fit == 'fit': assert tops == [.1]*6
    if fit == 'fit_paper': assert tops == pytest.approx([0, .1/3, .2/3, .1, .01 + .09*.75, .01 + .09*.25], rel=1e-6)
    if fit in ('fit_one_cycle', 'slice'): assert tops[0] == pytest.approx(.1/25) and max(tops) > .09


def test_weight_decay_stays_off_what_has_none_whatever_fit_is_given():
    learn = learner(cbs=Steps())
    quietly(learn, 'fit_one_cycle', 1, 1e-3, wd=.2)
    assert all(o == [.2, 0.]*4 for o in learn.steps.wds)


def test_lr_find_leaves_everything_as_it_was():
    learn = learner(**strong); start = state(learn.model)
    assert any(k.startswith('teacher.') for k in start)
    quietly(learn, 'lr_find', num_it=8, show_plot=False, suggest_funcs=())
    assert equal(state(learn.model), start)
    one,two = learner(**strong), learn
    for o in (one, two): o.dls.train.epoch = -1; quietly(o, 'fit_one_cycle', 1, 1e-2)
    assert equal(state(one.model), state(two.model))


# ---- mixed batches

class Batches(Callback):
    "Images, labels and losses as the model and the metrics see them"
    order = MixBatch.order + .1
    def before_fit(self): self.train,self.valid,self.after = [], [], []
    def before_batch(self): (self.train if self.training else self.valid).append((self.x.clone(), self.y.clone()))
    def after_batch(self): self.after.append(self.y.clone())


def test_training_is_mixed_and_validation_is_plain():
    learn = learner(cbs=Batches(), mixup=.8, cutmix=1.)
    quietly(learn, 'fit', 1, 1e-3)
    b = learn.batches
    assert all(y.shape == (8, 3) and torch.allclose(y.sum(1), torch.ones(8)) for _,y in b.train) and all(y.ndim == 1 for _,y in b.valid)
    assert all(y.ndim == 1 for y in b.after), 'metrics get the labels back'
    assert any((y.max(1).values < .9).any() for _,y in b.train)
    with torch.no_grad(): p = torch.cat([learn.model.eval()(x) for x,_ in b.valid]); y = torch.cat([y for _,y in b.valid])
    assert learn.recorder.values[-1][1] == pytest.approx(nn.functional.cross_entropy(p, y).item(), rel=1e-5)
    assert learn.recorder.values[-1][2] == pytest.approx((p.argmax(1) == y).float().mean().item())


def test_the_training_loss_is_that_of_the_shares():
    mix,x = MixBatch(4, mixup=.8, cutmix=1., smoothing=.1), torch.randn(6, 3, 8, 8)
    with seeded(0): images,shares = mix.mix(x, torch.tensor([0, 1, 2, 3, 0, 1]))
    pred = torch.randn(6, 4)
    from bootmae_nb.finetune import ClassLoss
    assert ClassLoss()(pred, shares).item() == pytest.approx(-(shares*pred.log_softmax(-1)).sum(1).mean().item(), rel=1e-5)
    assert shares.min() >= .1/4 - 1e-6 and not torch.equal(images, x)


def test_both_kinds_of_mixing_take_turns_and_a_share_is_an_area():
    mix,x,y = MixBatch(2, mixup=.8, cutmix=1., smoothing=0.), torch.zeros(2, 1, 16, 16), torch.tensor([0, 1])
    x[1] = 1
    kinds = set()
    for i in range(30):
        with seeded(i): images,shares = mix.mix(x, y)
        kinds.add('cut' if set(images.unique().tolist()) <= {0., 1.} else 'mix')
        assert images[0].mean().item() == pytest.approx(shares[0, 1].item(), abs=1e-5)
    assert kinds == {'cut', 'mix'}


def test_odd_batches_single_images_and_erasing():
    mix = MixBatch(3, mixup=.8, smoothing=.1)
    for n in (1, 3, 5):
        x = torch.randn(n, 3, 8, 8)
        images,shares = mix.mix(x, torch.zeros(n, dtype=torch.long))
        assert torch.equal(images[-1], x[-1]) and shares.shape == (n, 3) and torch.allclose(shares.sum(1), torch.ones(n))
    x = torch.full((200, 3, 16, 16), 7.)
    with seeded(0): images,_ = MixBatch(3, erasing=.25).mix(x, torch.zeros(200, dtype=torch.long))
    share = (images != x).flatten(1).any(1).float().mean().item()
    assert .15 < share < .36 and torch.equal(x, torch.full_like(x, 7.)), 'the batch itself is not changed'


@pytest.mark.parametrize('chans', [1, 3])
def test_randaugment_is_put_before_tensors_repeats_itself_and_leaves_validation_alone(chans):
    take = lambda spec: finetune_learner(digit_dls(chans, bs=20), encoder(in_chans=chans), randaug=spec, seed=5)
    plain,a,b = take(None), take('rand-m9-mstd0.5-inc1'), take('rand-m9-mstd0.5-inc1')
    first = lambda learn, i: learn.dls[i].one_batch()[0]
    assert torch.equal(first(a, 0), first(b, 0)) and not torch.equal(first(a, 0), first(plain, 0))
    assert torch.equal(first(a, 1), first(plain, 1))
    again = finetune_learner(a.dls, encoder(in_chans=chans), randaug=None)
    assert not any(isinstance(f, RandAugment) for f in again.dls.train.after_item.fs)


def test_randaugment_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match='randaug needs images that become tensors'): learner(randaug='rand-m9-mstd0.5-inc1')
    with pytest.raises(ValueError, match="randaug='nonsense' is none of timm's"): finetune_learner(digit_dls(), encoder(in_chans=1), randaug='nonsense')


# ---- the moving average

def test_the_average_is_the_formula_and_is_what_validates():
    class Follow(Callback):
        order = 80
        def after_step(self):
            now = self.model.encoder.state_dict()
            self.learn.mine = {k: .9*v + .1*now[k] for k,v in self.learn.mine.items()}
    learn = learner(ema=.9, cbs=[Follow(), Batches()])
    learn.mine = {k: v.clone() for k,v in learn.model.encoder.state_dict().items()}
    quietly(learn, 'fit', 2, 1e-2)
    assert close(learn.mine, learn.model.teacher.state_dict()) and not close(learn.mine, learn.model.encoder.state_dict(), 1e-4)
    x = learn.batches.valid[-1][0]
    def answer(use):
        learn.model.use_average = use
        with torch.no_grad(): return learn.model.eval()(x)
    averaged,last = answer(True), answer(False)
    assert not torch.allclose(averaged, last, atol=1e-5)
    quietly(learn, 'fit', 1, 0.)
    assert learn.recorder.values[-1][1] == pytest.approx(quietly(learn, 'validate')[0], rel=1e-6)
    learn.model.use_average = True
    vit = learn.model.train(False).teacher.vit
    with torch.no_grad(): assert torch.allclose(vit(x), learn.model(x), atol=1e-6)


def test_the_average_suits_the_run_and_its_steps():
    learn = learner(ema='run')
    quietly(learn, 'fit', 8, 1e-3)
    assert learn.average_weights.decay == pytest.approx(average_decay(8*6)) and average_decay(8*6) == pytest.approx(1 - 1/3.84)
    quietly(learn, 'fit', 8, 1e-3, cbs=GradientAccumulation(16))
    assert learn.average_weights.decay == pytest.approx(average_decay(8*3))
    with pytest.raises(ValueError, match="ema='always' is unknown"): AverageWeights('always')


def test_what_is_saved_is_what_validates(tmp_path):
    learn = learner(ema=.9); quietly(learn, 'fit', 2, 1e-2)
    x = torch.rand(3, 16, 16)
    before = classify(learn.model, x)
    saved = load_classifier(save_model(learn.model, tmp_path/'m'))
    assert saved.teacher is None and saved.vocab == ['dark', 'grey', 'light'] == load_model(tmp_path/'m.safetensors').config['classifier']['vocab']
    assert saved.config == learn.model.config and equal(state(saved.encoder), state(learn.model.teacher))
    assert classify(saved, x)[0] == before[0] and torch.allclose(classify(saved, x)[1], before[1])
    for model in (learn.model, saved):
        vit = to_timm(model).eval()
        with torch.no_grad(): assert torch.allclose(vit(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))),
                                                    saved(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))), atol=1e-5)
    learn.model.use_average = False
    assert equal(state(load_classifier(save_model(learn.model, tmp_path/'m')).encoder), state(learn.model.encoder))


# ---- it repeats itself and goes on

def test_same_seed_same_weights_and_another_seed_others():
    def run(seed=None, noise=False):
        if noise: torch.rand(7); np.random.rand(3)
        learn = learner(**strong, seed=seed); quietly(learn, 'fit_one_cycle', 2, 1e-2)
        return state(learn.model)
    one = run()
    assert equal(one, run(noise=True)) and equal(one, run(3)) and not equal(one, run(4))


class StopAt(Callback):
    order = 120
    def __init__(self, *at): self.at = at
    def after_batch(self):
        if self.training and (self.epoch, self.iter) == self.at: raise RuntimeError('stopped here')


@pytest.mark.parametrize('verb,args,kw', [('fit_one_cycle', (3, 1e-2), {}), ('fit_paper', (3, .1), {}), ('fit_one_cycle', (3, 1e-2), dict(cbs=GradientAccumulation(16))),
                                          ('fit_recipe', ('bootmae_base_finetune', 3), {}), ('fit_one_cycle', (3, 1e-2), dict(precision='bf16'))])
def test_stopped_and_gone_on_with_to_the_bit(verb, args, kw, tmp_path):
    more = {k: v for k,v in kw.items() if k == 'precision'}
    extra = kw.get('cbs')
    fresh = lambda *cbs: learner(**strong, **more, cbs=[*cbs, *([GradientAccumulation(16)] if extra else [])])
    one,two,rest = fresh(StopAt()), fresh(StopAt(1, 3)), fresh(StopAt())
    quietly(one, verb, *args)
    with pytest.raises(RuntimeError, match='stopped here'): quietly(two, verb, *args, cbs=RunState(tmp_path, steps=1))
    quietly(rest, 'resume', tmp_path)
    assert equal(state(rest.model), state(one.model)) and [[*o] for o in rest.recorder.values] == [[*o] for o in one.recorder.values]
    best = load_classifier(tmp_path/'best.safetensors')
    assert best.vocab == ['dark', 'grey', 'light']
    assert find_state(tmp_path)[1]['finished']


@pytest.mark.parametrize('kw,name', [(dict(layer_decay=.5), 'layer_decay'), (dict(mixup=.2), 'mixup'), (dict(vocab=['dark', 'grey', 'bright']), 'vocab')])
def test_a_run_that_was_started_otherwise_is_not_gone_on_with(kw, name, tmp_path):
    with pytest.raises(RuntimeError): quietly(learner(**strong, cbs=StopAt(0, 2)), 'fit_one_cycle', 2, 1e-2, cbs=RunState(tmp_path, steps=1))
    with pytest.raises(ResumeError, match=name): learner(**strong | kw, cbs=StopAt()).resume(tmp_path)


def test_save_and_load_of_fastai_keep_the_average(tmp_path):
    learn = learner(ema=.9, path=tmp_path); quietly(learn, 'fit', 1, 1e-2); before = state(learn.model)
    learn.save('here'); quietly(learn, 'fit', 1, 1e-2)
    assert not equal(state(learn.model), before)
    assert equal(state(learn.load('here').model), before)


def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    make = lambda bs, **kw: learner(dls=loaders(tensors(48), bs=bs), drop_path=0., ema=.9, **kw)
    def train(rank):
        learn = make(8)
        shared(learn, 'fit', 3, 1e-3)
        mixed = learner(dls=loaders(bs=8), cbs=Batches(), **strong)
        shared(mixed, 'fit', 1, 1e-3)
        return state(learn.model), learn.recorder.values[-1][1:], state(mixed.model), mixed.batches.train[0][1]
    one = make(16)
    quietly(one, 'fit', 3, 1e-3)
    a,b = together(train, tmp_path)
    assert equal(a[0], b[0]) and close(a[0], state(one.model)) and [*a[1]] == pytest.approx([*one.recorder.values[-1][1:]], rel=1e-4)
    assert equal(a[2], b[2]) and not torch.equal(a[3], b[3]), 'each mixes its own images'


def test_a_batch_with_nan_is_skipped(tmp_path):
    items = tensors(); items[5][0][0, 3, 3] = float('nan')
    learn = learner(dls=loaders(items, n_valid=4))
    with pytest.warns(UserWarning, match='is skipped, because 1 of its 8 images'): quietly(learn, 'fit', 2, 1e-3)
    assert all(v.isfinite().all() for v in learn.model.state_dict().values()) and len(learn.finite_guard.skips) == 2


# ---- from any encoder

def test_the_weights_are_those_of_the_encoder():
    enc = encoder()
    for clf,same in ((make_classifier(enc, 'ab'), True), (make_classifier(enc.encoder, 'ab', stats=((.5,)*3, (.5,)*3)), True),
                     (make_classifier(enc, 'ab', img_size=24), False)):
        own = clf.encoder.vit.state_dict()
        for k,v in enc.encoder.vit.state_dict().items():
            if k.startswith('norm.'): assert k not in own
            elif k != 'pos_embed' or same: assert torch.equal(own[k], v), k
    assert clf.grid == (6, 6) and clf.encoder.vit.pos_embed.shape[1] == 37 and torch.equal(own['pos_embed'][:, 0], enc.encoder.vit.pos_embed[:, 0])
    assert clf.method.mean == enc.method.mean and not any(p.requires_grad for p in enc.teacher.parameters())
    assert clf.encoder is not enc.encoder and own['blocks.0.attn.qkv.weight'].data_ptr() != enc.encoder.vit.blocks[0].attn.qkv.weight.data_ptr()


def test_grey_of_colour_and_colour_of_grey():
    rgb,grey = encoder('mae'), encoder('mae', in_chans=1)
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        one = make_classifier(rgb, 'ab', in_chans=1, drop_path=0.)
        assert torch.allclose(one.encoder(x)[-1], rgb.encoder(x.expand(-1, 3, -1, -1))[-1], atol=1e-5) and len(one.method.mean) == 1
        three = make_classifier(grey, 'ab', in_chans=3, drop_path=0.)
        assert torch.allclose(three.encoder(x.expand(-1, 3, -1, -1))[-1], grey.encoder(x)[-1], atol=1e-5) and len(three.method.mean) == 3


def test_files_of_ours_of_the_authors_and_models_of_timm(tmp_path):
    enc = encoder(width=64, heads=1)
    ours = save_model(enc, tmp_path/'model')
    torch.save(dict(model=to_authors(enc)), tmp_path/'theirs.pth')
    vit = timm.create_model('vit_tiny_patch16_224', img_size=16, patch_size=4, depth=2, num_classes=7)
    for o in (ours, str(ours), tmp_path):
        assert torch.equal(make_classifier(o, 'ab').encoder.vit.blocks[1].mlp.fc1.weight, enc.encoder.vit.blocks[1].mlp.fc1.weight)
    theirs = make_classifier(tmp_path/'theirs.pth', 'ab', drop_path=0.)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad(): assert torch.allclose(theirs.encoder(x)[-1], enc.encoder(x)[-1], atol=1e-5)
    clf = make_classifier(vit, 'ab', drop_path=0., pool='cls').eval()
    with torch.no_grad(): assert torch.allclose(clf.encoder.norm(clf.encoder(x)[-1]), vit.eval().forward_features(x), atol=1e-5)
    assert clf.method.mean == vit.pretrained_cfg['mean'] and clf.encoder.vit.head.out_features == 2


def test_a_fine_tuned_model_keeps_its_head_or_gets_a_new_one(tmp_path):
    learn = learner(); quietly(learn, 'fit', 1, 1e-2)
    for source in (learn.model, save_model(learn.model, tmp_path/'m')):
        kept = learner(source, keep_head=True)
        assert equal(state(kept.model), state(learn.model))
        new = learner(source)
        assert not torch.equal(new.model.encoder.vit.head.weight, learn.model.encoder.vit.head.weight)
        assert torch.equal(new.model.encoder.vit.blocks[0].mlp.fc1.weight, learn.model.encoder.vit.blocks[0].mlp.fc1.weight)
    with pytest.raises(ValueError, match="not those of the data .'grey' where the data has 'gray'"): learner(learn.model, keep_head=True, vocab=['dark', 'gray', 'light'])
    with pytest.raises(ValueError, match='tells 3 classes apart, and the data has 4'): learner(learn.model, keep_head=True, vocab=list('abcd'))
    with pytest.raises(ValueError, match='no head for classes'): learner(keep_head=True)


def test_pool_cls_keeps_the_norm_and_trains():
    learn = learner(pool='cls'); start = learn.model.encoder.vit.norm.weight.clone()
    assert equal(learn.model.encoder.vit.norm.state_dict(), encoder().encoder.vit.norm.state_dict()) and isinstance(learn.model.encoder.vit.fc_norm, nn.Identity)
    quietly(learn, 'fit', 2, 1e-2)
    assert not torch.equal(learn.model.encoder.vit.norm.weight, start)
    with pytest.raises(ValueError, match='no class token'): learner(encoder(class_token=False), pool='cls')
    quietly(learner(encoder(class_token=False)), 'fit', 1, 1e-3)


def test_statistics_of_the_encoder_replace_those_of_the_loaders():
    dls = loaders()
    dls.add_tfms([Normalize.from_stats((9.,)*3, (9.,)*3, cuda=False)], 'after_batch')
    learn = learner(dls=dls); mae = learner(encoder('mae'), dls=dls)
    norms = [f for f in mae.dls.train.after_batch.fs if isinstance(f, Normalize)]
    assert len(norms) == 1 and torch.allclose(norms[0].mean.flatten().as_subclass(torch.Tensor), torch.tensor([.485, .456, .406]))
    with seeded(0): x,y = mae.dls.valid.one_batch()
    raw = torch.stack([o[0] for o in tensors()[:8]]).as_subclass(torch.Tensor)
    assert torch.allclose(x*torch.tensor([.229, .224, .225])[:, None, None] + torch.tensor([.485, .456, .406])[:, None, None], raw, atol=1e-5)
    assert learn.model.method.mean == (.5,)*3


# ---- recipes

def test_recipes_of_the_papers():
    b,large,mb,ml = (finetune_recipes[f'{o}_finetune'] for o in ('bootmae_base', 'bootmae_large', 'mae_base', 'mae_large'))
    assert (b.lr, b.batch, b.epochs, b.warmup_epochs, b.layer_decay) == (pytest.approx(5e-3), 2048, 100, 20, .6)
    assert (large.lr, large.batch, large.epochs, large.warmup_epochs, large.layer_decay) == (pytest.approx(1.5e-3), 1024, 50, 5, .75)
    assert (mb.base_lr, mb.epochs, mb.warmup_epochs, mb.layer_decay, mb.drop_path) == (5e-4, 100, 5, .65, .1)
    assert (ml.base_lr, ml.epochs, ml.warmup_epochs, ml.layer_decay, ml.drop_path) == (1e-3, 50, 5, .75, .2)
    for r in finetune_recipes.values(): assert (r.mixup, r.cutmix, r.smoothing, r.erasing, r.wd, r.betas) == (.8, 1., .1, .25, .05, (.9, .999))
    with pytest.raises(ValueError, match='warm-up of 20 epochs does not fit into 10'): finetune_recipe(b, epochs=10)
    with pytest.raises(TypeError, match="field 'lr' is unknown"): finetune_recipe(b, lr=1)


def test_a_recipe_runs_its_schedule():
    r = finetune_recipe('mae_base_finetune', warmup_epochs=50, randaug=None)
    learn = finetune_recipe_learner(loaders(), encoder(), r, vocab=list('abc'), cbs=Steps())
    assert (learn.mix_batch.settings['mixup'], learn.model.method.drop_path, learn.opt_func.keywords['layer_decay']) == (.8, .1, .65)
    quietly(learn, 'fit_recipe', r, 2)
    top,n = 5e-4*8/256, 6
    want = [top*i/n for i in range(n)] + [1e-6*8/1024 + (top - 1e-6*8/1024)*(1 + math.cos(math.pi*i/n))/2 for i in range(n)]
    assert [o[-1] for o in learn.steps.lrs] == pytest.approx(want, rel=1e-6, abs=1e-12)


# ---- what is wrong is said

@pytest.mark.parametrize('change,match', [
    (dict(dls=lambda: mim_dls(img_size=16, bs=4, crops_per_image=1, num_workers=0, device='cpu')), 'images without labels'),
    (dict(dls=lambda: loaders([(x, torch.rand(3)) for x,_ in tensors()])), r'labels are torch.float32 of shape \(8, 3\)'),
    (dict(dls=lambda: loaders([(x, torch.tensor([1, 0, 1])) for x,_ in tensors()])), r'labels are torch.int64 of shape \(8, 3\)'),
    (dict(dls=lambda: loaders([(x, float(y)) for x,y in tensors()])), 'labels are torch.float'),
    (dict(dls=lambda: loaders([((x*255).byte(), y) for x,y in tensors()])), 'images are torch.uint8'),
    (dict(dls=lambda: loaders(tensors(size=18))), 'image size 18 x 18 is not divisible by the patch size 4'),
    (dict(vocab=['dark']), r'there is one class \(dark\)'), (dict(vocab=['a', 'a', 'b']), 'a class is named twice'),
    (dict(vocab=['dark', 'light']), 'a label is 2, and there are 2 classes'), (dict(vocab=None), 'do not tell their classes'),
    (dict(layer_decay=0.), r'layer_decay=0.0 is outside \(0, 1\]'), (dict(precision='half'), "precision 'half' is unknown"),
    (dict(pool='max'), "pool 'max' is unknown"), (dict(mixup=-1.), 'mixup=-1.0 is below 0'), (dict(smoothing=2.), 'smoothing=2.0 is outside'),
    (dict(enc=lambda: encoder().encoder), 'does not know its input statistics'),
    (dict(enc=lambda: timm.create_model('swin_tiny_patch4_window7_224')), 'not a plain vision transformer'), (dict(enc=lambda: 7), 'encoder is a int'),
    (dict(enc=lambda: 'nowhere.pth'), 'nowhere.pth is not there')])
def test_errors(change, match):
    change = dict(change)
    make = {k: change.pop(k)() for k in ('dls', 'enc') if k in change}
    with pytest.raises((ValueError, TypeError), match=match): learner(**make, **change)


def test_loaders_of_a_pretraining_and_weights_with_nan_are_refused():
    dls = digit_dls(1)
    mim_learner(dls, encoder(in_chans=1))
    with pytest.raises(ValueError, match='prepared for pretraining'): finetune_learner(dls, encoder(in_chans=1))
    enc = encoder(); enc.encoder.vit.blocks[0].mlp.fc1.weight.data[0, 0] = float('nan')
    with pytest.raises(ValueError, match='1 tensors of the encoder hold NaN'): learner(enc)
    with pytest.raises(ValueError, match='no head for classes'): Classifier(encoder())


def test_folders_of_images_from_the_first_batch_to_an_export(tmp_path):
    images,y,_ = digits(3)
    for i in range(60):
        (tmp_path/f'n{y[i]}').mkdir(exist_ok=True); images[i].save(tmp_path/f'n{y[i]}'/f'{i}.png')
    other = Normalize.from_stats((.1,)*3, (.2,)*3)
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=.3, seed=1, item_tfms=Resize(16), batch_tfms=other, bs=8, num_workers=0, device='cpu')
    learn = finetune_learner(dls, encoder(), randaug='rand-m9-mstd0.5-inc1', **strong)
    quietly(learn, 'fit_one_cycle', 2, 1e-2)
    file = next(tmp_path.rglob('*.png'))
    label,p = learn.predict(file)
    assert label in learn.model.vocab == sorted({f'n{o}' for o in y[:60]}) and p.sum().item() == pytest.approx(1, abs=1e-5)
    for item in (str(file), PILImage.create(file)): assert torch.equal(learn.predict(item)[1], p)
    assert torch.allclose(classify(learn.model, file)[1], p, atol=1e-4)
    with learn.no_bar(): learn.show_results(max_n=2); learn.dls.show_batch(max_n=2)
    assert learn.show_mixed(3).width > 300
    learn.export(); again = load_learner(tmp_path/'export.pkl')
    assert torch.allclose(again.predict(file)[1], p, atol=1e-6) and equal(state(copy.deepcopy(learn.model)), state(learn.model))
