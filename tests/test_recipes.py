"""Recipes: the numbers of the papers, the learning rate of every step, and what reaches the learner."""
import math

import numpy as np
import pytest
import timm
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation, GradientClip

from common import quietly
from bootmae_nb import recipes as module
from bootmae_nb.callbacks import MomentumTeacher
from bootmae_nb.data import CropImage, mim_dls
from bootmae_nb.checkpoints import load_model
from bootmae_nb.models import mim_model
from bootmae_nb.recipes import Recipe, recipe, recipe_learner, recipes
from bootmae_nb.vit import make_encoder

base, large, huge = 'vit_base_patch16_224', 'vit_large_patch16_224', 'vit_huge_patch14_224'
half, imagenet = ((.5,)*3, (.5,)*3), ((.485, .456, .406), (.229, .224, .225))
small = dict(arch='vit_tiny_patch16_224', width=48, depth=1, heads=3, patch_size=8)
sizes = dict(bootmae=small | dict(pixel_width=48, feature_width=48, pixel_depth=1, feature_depth=1),
             mae=small | dict(pixel_width=48, pixel_depth=1, pixel_heads=3), dbot=small | dict(feature_width=48, feature_depth=1, feature_heads=3))


def loaders(bs=4, crops=4, **kw):
    return mim_dls(**(dict(img_size=32, bs=bs, crops_per_image=crops, num_workers=0, seed=1, device='cpu') | kw))


def learner(name, dls=None, **kw):
    r = recipe(name)
    return recipe_learner(dls or loaders(), r, **(sizes[r.method] | kw))


class Rates(Callback):
    "What the optimiser was given at each of its steps"
    def before_fit(self): self.lrs,self.wds = [], []
    def after_step(self):
        self.lrs.append([o['lr'] for o in self.opt.hypers]); self.wds.append([o['wd'] for o in self.opt.hypers])


# the numbers

@pytest.mark.parametrize('name, arch, epochs, stages, min_lr, drop_path, clip, dynamic, teacher_depth, stats', [
    ('bootmae_base_800', base, 800, 1, 1e-4, 0, None, True, None, half),
    ('bootmae_large_800', large, 800, 1, 1e-5, 0, None, False, None, half),
    ('mae_base_800', base, 800, 1, 0, 0, None, None, None, imagenet), ('mae_base_1600', base, 1600, 1, 0, 0, None, None, None, imagenet),
    ('mae_large_800', large, 800, 1, 0, 0, None, None, None, imagenet), ('mae_large_1600', large, 1600, 1, 0, 0, None, None, None, imagenet),
    ('mae_huge_800', huge, 800, 1, 0, 0, None, None, None, imagenet), ('mae_huge_1600', huge, 1600, 1, 0, 0, None, None, None, imagenet),
    ('dbot_base_1600', base, 800, 2, 0, .2, 3., None, None, imagenet), ('dbot_large_1600', large, 800, 2, 0, .2, None, None, 0, imagenet),
    ('dbot_huge_1600', huge, 800, 2, 0, .3, None, None, 0, imagenet)])
def test_numbers_of_the_papers(name, arch, epochs, stages, min_lr, drop_path, clip, dynamic, teacher_depth, stats):
    r = recipe(name)
    assert (r.name, r.arch, r.epochs, r.stages, r.min_lr, r.drop_path, r.clip) == (name, arch, epochs, stages, min_lr, drop_path, clip)
    assert (r.method, r.teacher_depth, (r.mean, r.std)) == (name.split('_')[0], teacher_depth, stats)
    assert dynamic in (None, r.ema_dynamic)
    assert (r.base_lr, r.batch, r.warmup_epochs, r.wd, r.betas) == (1.5e-4, 4096, 40, .05, (.9, .95)) and math.isclose(r.lr, 2.4e-3)
    assert (r.img_size, r.min_scale, r.flip, r.interpolation) == (224, .2, True, 'bicubic') and (r.ema, r.weight_of_features) == (None, None)
    assert timm.is_model(arch) and 'arXiv 2' in r.source


def test_there_are_no_other_recipes():
    assert len(recipes) == 11 and all(k == r.name for k, r in recipes.items())


# overrides

def test_overrides_leave_the_rest_and_the_table_alone():
    r = recipe('dbot_large_1600', clip=1., betas=(.9, .98))
    assert (r.clip, r.betas, r.drop_path, r.stages) == (1., (.9, .98), .2, 2)
    assert recipe(r, clip=None).betas == (.9, .98)
    assert recipes['dbot_large_1600'].clip is None and recipe('dbot_large_1600') is not r
    with pytest.raises(AttributeError): r.clip = 2.


@pytest.mark.parametrize('name, kw, error, says', [
    ('bootmae_base', {}, ValueError, "recipe 'bootmae_base' is unknown: did you mean bootmae_base_800?; choose one of bootmae_base_800, bootmae_large_800, mae_base_800"),
    ('simmim', {}, ValueError, "recipe 'simmim' is unknown; choose one of"), (7, {}, ValueError, 'recipe 7 is unknown'),
    ('mae_base_800', dict(min_lrs=0), TypeError, "field 'min_lrs' is unknown: did you mean min_lr?; choose one of method, arch"),
    ('mae_base_800', dict(method='mai'), ValueError, "method 'mai' is unknown"), ('mae_base_800', dict(batch=0), ValueError, 'batch 0 are no run'),
    ('mae_base_800', dict(epochs=40), ValueError, 'a warm-up of 40 epochs does not fit into 40: shorten it too, as for_batch(epochs=…) does'),
    ('bootmae_base_800', dict(batch=128), ValueError, 'the last learning rate 1e-4 is above the highest, 7.5e-5 for batch 128: lower min_lr too'),
    ('mae_base_800', dict(base_lr=0.), ValueError, 'base_lr 0.0 teaches nothing'), ('mae_base_800', dict(min_lr=-1.), ValueError, 'is above the highest'),
    ('mae_base_800', dict(interpolation='bilinear'), ValueError, "interpolation 'bilinear' is not possible")])
def test_errors(name, kw, error, says):
    with pytest.raises(error) as e: recipe(name, **kw)
    assert says in str(e.value) and '\n' not in str(e.value)


def test_another_batch_or_length_keeps_the_shape():
    r = recipe('bootmae_base_800'); s = r.for_batch(512, epochs=200)
    assert math.isclose(s.lr, 3e-4) and math.isclose(s.min_lr, 1.25e-5) and s.warmup_epochs == 10 and math.isclose(s.floor, 1/24)
    assert s.ema == 'run' and s.for_batch(epochs=100).ema == 'run' and r.for_batch(512).ema is None and recipe(r, ema=.99).for_batch(epochs=100).ema == .99
    assert recipe('dbot_base_1600').for_batch(epochs=100).ema is None
    again = s.for_batch(4096, 800)
    assert math.isclose(again.min_lr, 1e-4) and again.warmup_epochs == 40
    for e in (0, 3, 10, 77, 200): assert math.isclose(s.lr_at(e)/s.lr, r.lr_at(4*e)/r.lr)
    for bad in dict(bs=0), dict(epochs=0), dict(bs=-1):
        with pytest.raises(ValueError, match='no run'): r.for_batch(**bad)


# printing

def test_printed_recipe_resolves_the_rule_and_names_changes():
    text = str(recipe('bootmae_large_800'))
    assert text == repr(recipe('bootmae_large_800')) and text.startswith('bootmae_large_800\n  method         bootmae with vit_large_patch16_224\n')
    assert '1.5e-4 x 4096 / 256 = 2.4e-3, 40 epochs of linear warm-up, cosine to 1e-5' in text and 'no clipping' in text and 'changed' not in text
    assert 'decay 0.999 to 0.9999 over 100 epochs\n' in text
    assert 'to 0.99999 at epoch 400\n' in str(recipe('bootmae_base_800'))
    assert 'decay 0.99 to 0.999\n' in str(recipe('bootmae_base_800', ema=(.99, .999))) and 'decay 0.95\n' in str(recipe('bootmae_base_800', ema=.95))
    text = str(recipe('bootmae_base_800').for_batch(256, 100))
    assert '1.5e-4 x 256 / 256 = 1.5e-4, 5 epochs' in text and 'scaled from 800 epochs to the run' in text
    assert 'changed        epochs 800 -> 100, batch 4096 -> 256, warmup_epochs 40 -> 5, min_lr 1e-4 -> 6.25e-6, ema None -> run' in text
    assert 'teacher        none' in str(recipe('mae_base_800')) and 'cosine to 0\n' in str(recipe('mae_base_800'))
    text = str(recipe('dbot_base_1600'))
    assert '800 epochs in each of 2 stages' in text and 'gradients clipped at norm 3' in text and 'random weights as deep as the encoder, then' in text
    assert 'random weights without blocks' in str(recipe('dbot_huge_1600')) and 'of 4 blocks' in str(recipe('dbot_huge_1600', teacher_depth=4))


# the learning rate

def of_paper(step, per_epoch, epochs, warmup, lr, min_lr):
    "Learning rate of a step, counted from 0, as in the scripts: set before each step from the epoch with its fraction"
    e = step/per_epoch
    if e < warmup: return lr*e/warmup
    return min_lr + (lr - min_lr)*.5*(1 + math.cos(math.pi*(e - warmup)/(epochs - warmup)))


@pytest.mark.parametrize('name, min_lr, epochs', [('bootmae_base_800', 1e-4, 800), ('bootmae_large_800', 1e-5, 800), ('mae_base_800', 0, 800),
                                                  ('mae_huge_1600', 0, 1600), ('dbot_base_1600', 0, 800)])
def test_rule_of_the_papers_at_any_moment(name, min_lr, epochs):
    r = recipe(name)
    for step in range(0, 3*epochs, 7):
        assert math.isclose(r.lr_at(step/3), of_paper(step, 3, epochs, 40, 1.5e-4*4096/256, min_lr), abs_tol=1e-15)
    assert math.isclose(r.lr_at(epochs*r.stages), min_lr)


def test_stages_start_again():
    r = recipe('dbot_base_1600')
    assert r.lr_at(800) == 0 == r.lr_at(1600) and r.lr_at(799.999) < 1e-9
    for e in (10, 40, 500): assert math.isclose(r.lr_at(800 + e), r.lr_at(e))


@pytest.mark.parametrize('name, floor', [('bootmae_base_800', 1e-4/2.4e-3), ('bootmae_large_800', 1e-5/2.4e-3), ('mae_base_1600', 0)])
@pytest.mark.parametrize('warmup', [None, 1.5])
def test_every_step_of_a_run_has_the_rate_of_the_paper(name, floor, warmup):
    learn = learner(name, cbs=Rates())
    n, total = len(learn.dls.train), (1600 if '1600' in name else 800)
    peak = 1.5e-4*4/256
    r = recipe(name) if warmup is None else recipe(name, warmup_epochs=warmup*total/4)
    quietly(learn, 'fit_recipe', r, epochs=4)
    want = [of_paper(i, n, 4, 40/total*4 if warmup is None else warmup, peak, peak*floor) for i in range(4*n)]
    assert len(learn.rates.lrs) == 4*n and n > 5
    assert np.abs(np.array(learn.rates.lrs) - np.array([want, want]).T).max() < 1e-6*peak


def test_weight_decay_is_the_recipes_for_one_group_only():
    learn = learner('mae_base_800', cbs=Rates(), wd=.3)
    quietly(learn, 'fit_recipe', recipe('mae_base_800', wd=.07), epochs=1)
    assert {tuple(o) for o in learn.rates.wds} == {(.07, 0.)}
    for g,norms in zip(learn.opt.opt.param_groups, (False, True)): assert g['betas'] == (.9, .95) and (g['params'][0].ndim < 2) == norms


@pytest.mark.parametrize('collected, step', [(None, 4), (10, 12), (2, 4)])
def test_rate_follows_the_images_of_a_step(collected, step):
    "10 images are collected from batches of 4, so steps have 12"
    cbs = [Rates(), *([GradientAccumulation(collected)] if collected else [])]
    learn = learner('mae_base_800', cbs=cbs)
    quietly(learn, 'fit_recipe', recipe('mae_base_800', warmup_epochs=0), epochs=1)
    assert math.isclose(max(o for (o,_) in learn.rates.lrs), 1.5e-4*step/256, rel_tol=.1 if collected else 1e-6)
    more = learner('mae_base_800', cbs=Rates())
    quietly(more, 'fit_recipe', recipe('mae_base_800', warmup_epochs=0), epochs=1, bs=4096)
    assert math.isclose(more.rates.lrs[0][0], 2.4e-3, rel_tol=1e-6)


def test_a_name_is_enough_and_a_run_can_start_later():
    learn = learner('mae_base_800', cbs=Rates())
    quietly(learn, 'fit_recipe', 'mae_base_800', epochs=3)
    lrs = learn.rates.lrs
    quietly(learn, 'fit_recipe', 'mae_base_800', epochs=3, start_epoch=2)
    assert np.allclose(lrs[-len(learn.dls.train):], learn.rates.lrs)


# the learner

def test_two_epochs_of_the_base_recipe():
    r = recipe('bootmae_base_800')
    learn = learner('bootmae_base_800', loaders(bs=8, crops=8), cbs=Rates())
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    quietly(learn, 'fit_recipe', recipe(r, base_lr=.03, min_lr=.02), epochs=2)
    first, last = (learn.recorder.values[i][0] for i in (0, -1))
    assert last < first and all(p.isfinite().all() for p in learn.model.parameters())
    moved = {k for k,v in learn.model.state_dict().items() if not torch.equal(v, before[k])}
    assert any(k.startswith('teacher') for k in moved) and any(k.startswith('decoders.features') for k in moved)


@pytest.mark.parametrize('name', recipes)
def test_what_reaches_the_learner(name, monkeypatch):
    seen = {}
    monkeypatch.setattr(module, 'mim_learner', lambda dls, **kw: seen.update(kw))
    r = recipe(name)
    recipe_learner(loaders(), recipe(r, wd=.1), cbs=Rates(), seed=3)
    assert (seen['arch'], seen['method'], seen['drop_path'], seen['wd'], seen['betas']) == (r.arch, r.method, r.drop_path, .1, (.9, .95))
    assert (seen['ema'], seen['ema_dynamic'], seen['weight_of_features'], seen['mean'], seen['std']) == (None, r.ema_dynamic, None, r.mean, r.std)
    assert math.isclose(seen['lr'], 1.5e-4*4/256) and seen['seed'] == 3
    assert seen['clip'] == (3. if name == 'dbot_base_1600' else None)
    assert isinstance(seen['cbs'], Rates)
    assert seen.get('teacher_depth', 'absent') == (0 if name in ('dbot_large_1600', 'dbot_huge_1600') else 'absent')


def test_keywords_win_over_the_recipe():
    learn = learner('dbot_base_1600', drop_path=0., wd=.2, betas=(.8, .9))
    assert learn.model.method.drop_path == 0 and learn.wd == .2 and learn.create_opt() is None and learn.opt.opt.defaults['betas'] == (.8, .9)
    assert learner('dbot_base_1600').model.method.drop_path == .2


def test_another_teacher_than_the_recipes():
    "The depth of the random teacher has no meaning for it"
    enc = make_encoder('vit_tiny_patch16_224', 32, patch_size=8, width=96, depth=2, heads=3)
    learn = learner('dbot_large_1600', teacher=enc)
    assert learn.model.method.teacher == 'external' and learn.model.teacher.dim == 96 and learn.model.method.teacher_depth is None
    assert learner('dbot_large_1600', teacher='frozen').model.teacher.depth == 0


def test_a_model_in_place_of_arch_keeps_its_own_row():
    model = mim_model('dbot', img_size=32, seed=0, **sizes['dbot'], drop_path=.1)
    for name in ('dbot_base_1600', 'dbot_large_1600'):
        learn = recipe_learner(loaders(), name, arch=model)
        assert learn.model is model and learn.model.method.drop_path == .1 and learn.wd == .05


@pytest.mark.parametrize('name, dynamic', [('bootmae_base_800', True), ('bootmae_large_800', False)])
def test_momentum_is_the_recipes_and_follows_a_shorter_run(name, dynamic):
    learn = learner(name)
    cb, = (o for o in learn.cbs if isinstance(o, MomentumTeacher))
    assert (cb.decay_arg, cb.dynamic) == (None, dynamic)
    quietly(learn, 'fit_recipe', name, epochs=1)
    assert cb.decay_arg == 'run'
    learn = learner(name, ema=.9)
    quietly(learn, 'fit_recipe', name, epochs=1)
    assert {o.decay_arg for o in learn.cbs if isinstance(o, MomentumTeacher)} == {.9}


def test_clipping_bounds_the_gradient():
    class Norm(Callback):
        order = GradientClip.order + 1
        def before_fit(self): self.norms = []
        def before_step(self): self.norms.append(float(torch.stack([p.grad.norm() for p in self.model.parameters() if p.grad is not None]).norm()))
    learn = recipe_learner(loaders(), recipe('dbot_base_1600', clip=1e-3, stages=1), **sizes['dbot'], cbs=Norm())
    quietly(learn, 'fit_recipe', recipe('dbot_base_1600', stages=1), epochs=1)
    assert max(learn.norm.norms) < 1.01e-3


# stages

@pytest.mark.parametrize('name', ['dbot_base_1600', 'dbot_large_1600'])
def test_stages_run_the_whole_schedule_in_each(name, tmp_path):
    "Two stages of two epochs: the same rates in each, by the formula; the encoder of the first teaches the second"
    learn = learner(name, cbs=Rates(), path=tmp_path)
    assert learn.model.teacher.depth == (0 if name == 'dbot_large_1600' else learn.model.encoder.depth)
    log = quietly(learn, 'fit_recipe', name, epochs=2)
    r,n = recipe(name).for_batch(learn.dls.train.bs, 2), len(learn.dls.train)
    want = [r.lr_at(i/n) for i in range(4*n)]
    assert [o for o,_ in learn.rates.lrs] == pytest.approx(want, rel=1e-5, abs=1e-12)
    assert [o['stage'] for o in log] == [1, 2] and (tmp_path/'stages'/'stage_1.safetensors').is_file()
    first = load_model(log[0]['file']).encoder.vit.state_dict()
    assert all(torch.equal(v, first[k]) for k,v in learn.model.teacher.vit.state_dict().items())


def test_a_recipe_goes_on_within_its_second_stage(tmp_path):
    class Once(Rates):
        def before_train(self): self.epochs = [*getattr(self, 'epochs', []), self.epoch]
    learn = learner('dbot_base_1600', cbs=Once(), path=tmp_path)
    quietly(learn, 'fit_recipe', 'dbot_base_1600', epochs=2, start_epoch=3)
    assert learn.once.epochs == [3] and learn.once.lrs[0][0] == pytest.approx(recipe('dbot_base_1600').for_batch(learn.dls.train.bs, 2).lr_at(3), rel=1e-5)


# the data

def test_crops_are_those_of_the_recipe():
    r = recipe('mae_base_800', img_size=48, min_scale=.5, flip=False)
    dls = loaders(**r.dls_kwargs())
    crop, = (f for f in dls.train.after_item.fs if isinstance(f, CropImage))
    assert dls.one_batch()[0].shape[2:] == (48, 48) and crop.min_scale == .5 and not any(type(f).__name__ == 'FlipCrop' for f in dls.train.after_item.fs)
    assert any(type(f).__name__ == 'FlipCrop' for f in loaders(**recipe('mae_base_800').dls_kwargs() | dict(img_size=32)).train.after_item.fs)
    assert recipe('mae_base_800').dls_kwargs() == dict(img_size=224, min_scale=.2, flip=True)


def test_recipes_of_ones_own():
    r = Recipe('mine', 'mae', 'vit_small_patch16_224', epochs=10, warmup_epochs=1, batch=512)
    assert math.isclose(r.lr, 3e-4) and 'changed' not in str(r) and recipe(r, batch=256).lr == 1.5e-4
