"""Bad numbers: they are skipped whole, named, counted and stopped; a collapse is told, health is not."""
import json
import math
import multiprocessing
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException, CancelStepException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders

from common import equal, quietly, state
from bootmae_nb.checkpoints import CheckpointError, read_file
from bootmae_nb.data import SeededDL, mim_dls
from bootmae_nb.guards import CollapseAlarm, FiniteGuard, NonFiniteError, any_rank, bad_images, likeness
from bootmae_nb.learner import mim_learner

tiny = dict(arch='vit_tiny_patch16_224', width=48, depth=2, heads=3, patch_size=8, pixel_width=48, pixel_depth=1, feature_depth=1, mask='random', weight_of_features=1.)
bad_numbers = pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf, 1e30])


class Images:
    "Fixed images with names, some of them with one bad value, or all of them the same"
    def __init__(self, n=24, bad=None, same=False): self.items,self.bad,self.same = [f'image_{i:02}.png' for i in range(n)], bad or {}, same
    def __len__(self): return len(self.items)
    def __getitem__(self, i):
        x = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(0 if self.same else i))
        x = torch.nn.functional.interpolate(x[None], size=32, mode='bilinear')[0]
        if i in self.bad: x[1,7,9] = self.bad[i]
        return (x,)


def learner(bad=None, valid_bad=None, bs=4, n=24, same=False, **kw):
    dls = DataLoaders(SeededDL(Images(n, bad, same), bs=bs, shuffle=True, num_workers=0, seed=3), SeededDL(Images(4, valid_bad), bs=bs, num_workers=0), device='cpu')
    return mim_learner(dls, **(tiny | dict(ema=.9) if kw.get('method', 'bootmae') == 'bootmae' else tiny) | kw)


class Changes(Callback):
    "For each training batch, whether it changed anything of the model or the optimiser's moments"
    order = 95
    def snapshot(self): return state(self.model) | {(i, k): v.clone() for i,s in enumerate(self.opt.opt.state.values()) for k,v in s.items()}
    def before_fit(self): self.changed = []
    def before_batch(self): self.before = self.snapshot() if self.training else None
    def after_batch(self):
        if self.training: self.changed.append(not equal(self.before, self.snapshot()))


class Do(Callback):
    "Call something in an event of training"
    def __init__(self, event, f, order=12): self.order,self.f = order, f; setattr(self, event, lambda: f(self) if self.training else None)


def fit(learn, n=1, lr=1e-3, **kw):
    "The texts of the warnings of a fit"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        quietly(learn, 'fit', n, lr, **kw)
    return [str(o.message) for o in told if 'is skipped' in str(o.message) or 'alike' in str(o.message) or 'feature loss' in str(o.message)]


def all_finite(learn): return all(v.isfinite().all() for v in learn.model.state_dict().values())


# one bad batch

@pytest.mark.parametrize('method, precision', [('bootmae', 'fp32'), ('bootmae', 'bf16'), ('mae', 'fp32')])
@bad_numbers
def test_one_bad_pixel_costs_its_batch_and_nothing_else(value, method, precision):
    learn = learner({7: value}, method=method, precision=precision, cbs=Changes())
    told = fit(learn)
    skip, = learn.finite_guard.skips
    assert (skip['why'], skip['images'], skip['files']) == ('images', 1, ['image_07.png'])
    assert learn.changes.changed == [i != skip['batch'] for i in range(6)]           # teacher, feature mean and moments among them
    assert len(told) == 1 and 'image_07.png' in told[0] and f'batch {skip["batch"]} is skipped' in told[0] and '1 of its 4 images' in told[0]
    assert all_finite(learn) and len(learn.recorder.losses) == 5 and all(map(math.isfinite, learn.recorder.losses))
    assert all(map(math.isfinite, learn.recorder.values[0])) and learn.pct_train == pytest.approx(1) and learn.train_iter == 6


def test_without_the_guard_the_same_batch_ruins_the_run():
    learn = learner({7: torch.nan}, guard=False)
    fit(learn)
    assert not all_finite(learn)


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_a_loss_that_is_not_finite_is_skipped_and_the_images_are_not_blamed(precision):
    spoil = Do('after_pred', lambda cb: setattr(cb.learn, 'pred', tuple(o*torch.nan for o in cb.pred)) if cb.iter == 1 else None)
    learn = learner(bs=8, precision=precision, cbs=[Changes(), spoil])
    told, = fit(learn)
    skip, = learn.finite_guard.skips
    assert (skip['why'], skip['images'], len(skip['files']), skip['batch']) == ('loss', 8, 5, 1) and learn.changes.changed == [True, False, True]
    assert 'images look normal' in told and 'and 3 more' in told and all_finite(learn)


@pytest.mark.parametrize('clip', [None, 1.])
def test_an_infinite_gradient_with_a_finite_loss_is_no_step(clip):
    def spoil(cb):
        if cb.iter == 2: next(cb.model.encoder.parameters()).grad[0] = torch.inf
    seen = {}
    at = lambda event, name, order: Do(event, lambda cb: seen.update({name: state(cb.model)}) if cb.iter == 2 else None, order)
    learn = learner(clip=clip, cbs=Do('after_backward', spoil))
    for cb in at('before_step', 'before', 5), at('after_batch', 'after', 12): learn.cbs.append(cb); cb.learn = learn    # of one class, which `add_cb` would confuse
    told, = fit(learn)
    assert equal(seen['before'], seen['after']) and 'the gradient is not finite' in told and learn.finite_guard.counts == {'gradient': 1}
    assert len(learn.finite_guard.norms) == 5 and len(learn.recorder.losses) == 6 and all_finite(learn)


def test_accumulation_goes_on_as_if_a_bad_batch_were_not_there():
    steps = []
    learn = learner({7: torch.nan}, cbs=[GradientAccumulation(8), Do('after_step', lambda cb: steps.append(cb.iter))])
    fit(learn)
    assert len(steps) == len(learn.finite_guard.norms) == 2 and learn.gradient_accumulation.count == 4 and all_finite(learn)
    bad = learn.finite_guard.skips[0]['batch']
    assert steps == [[i for i in range(6) if i != bad][k] for k in (1, 3)]


# several

@bad_numbers
def test_five_bad_batches_in_a_row_stop_the_run_by_name_and_nothing_bad_is_on_disk(value, tmp_path):
    learn = learner(dict.fromkeys(range(24), value), path=tmp_path, cbs=SaveModelCallback(every_epoch=True))
    learn.save('before')
    before = state(learn.model)
    with pytest.raises(NonFiniteError, match='5 batches in a row could not be used, the last in epoch 0, batch 4: 4 of its 4 images') as e: fit(learn, 3)
    assert str(e.value).startswith('5 batches') and 'Look at these files' in str(e.value) and equal(before, state(learn.model))
    files = [*tmp_path.rglob('*.pth')]
    assert files and all(v.isfinite().all() for f in files for v in read_file(f).get('model', {}).values())


def test_a_learning_rate_that_explodes_stops_and_is_named(tmp_path):
    learn = learner(lr=1e20, path=tmp_path)
    with pytest.raises(NonFiniteError, match='Try a learning rate below 1e\\+30, clip=1'): fit(learn, 3, 1e30)
    assert learn.finite_guard.in_row['batches'] == 5 and learn.finite_guard.counts == {'loss': 5}


def test_gradients_that_are_never_finite_stop_the_run():
    learn = learner(cbs=Do('after_backward', lambda cb: next(cb.model.encoder.parameters()).grad.fill_(torch.nan)))
    before = state(learn.model)
    with pytest.raises(NonFiniteError, match='5 steps in a row'): fit(learn)
    same = {k: v for k,v in state(learn.model).items() if not k.startswith('feature_')}
    assert equal({k: before[k] for k in same}, same)


def test_weights_that_are_bad_already_are_named_and_not_saved(tmp_path):
    learn = learner(path=tmp_path)
    good = learn.save('model').read_bytes()
    with torch.no_grad(): learn.model.encoder.vit.norm.bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r'weights are not finite themselves \(encoder.vit.norm.bias\): go on from an earlier checkpoint'): fit(learn)
    for verb in (learn.save, learn.export):
        with pytest.raises(CheckpointError, match='is not saved, because 1 of .* tensors hold NaN'): verb('model')
    assert (tmp_path/'models'/'model.pth').read_bytes() == good and not (tmp_path/'model').exists()


def test_good_batches_in_between_begin_the_count_anew_and_warnings_are_few():
    learn = learner(dict.fromkeys(range(0, 30, 2), torch.nan), n=30, bs=1, guard=False, cbs=FiniteGuard(max_in_row=9, max_warnings=4))
    told = fit(learn)
    assert len(learn.finite_guard.skips) == 15 and len(told) == 4 and 'further skips of this fit are not told' in told[-1]
    assert {f for o in learn.finite_guard.skips for f in o['files']} == {f'image_{i:02}.png' for i in range(0, 30, 2)}


def test_fp16_may_skip_steps_to_find_its_scale_but_not_forever():
    class Scaler(MixedPrecision):
        def __init__(self, n): super().__init__(); self.n = n
        def before_batch(self): self.skipped = False
        def after_pred(self): pass
        def after_loss(self): pass
        def before_fit(self): pass
        def before_backward(self): pass
        def after_step(self): pass
        def after_fit(self): pass
        def before_step(self):
            self.skipped = self.train_iter < self.n
            if self.skipped: raise CancelStepException
    learn = learner(bs=1, cbs=Scaler(20))
    before = state(learn.model.teacher)
    fit(learn)
    assert not learn.finite_guard.skips and len(learn.finite_guard.norms) == 4 and not equal(before, state(learn.model.teacher))
    with pytest.raises(NonFiniteError, match='scaler has skipped 50 steps in a row.*bf16 or fp32 in place of fp16'): fit(learner(bs=1, cbs=Scaler(99)), 3)


# what it leaves alone

def test_a_bad_validation_image_shows_in_its_loss_and_nowhere_else():
    def run(bad):
        learn = learner(valid_bad=bad)
        assert not fit(learn, 2)
        return learn
    good,bad = run(None), run({1: torch.nan})
    assert equal(state(good.model), state(bad.model)) and math.isnan(bad.recorder.values[0][1]) and not math.isnan(good.recorder.values[0][1])
    assert [o[0] for o in good.recorder.values] == [o[0] for o in bad.recorder.values] and not bad.finite_guard.skips


@pytest.mark.parametrize('cbs', [[], [GradientAccumulation(8)]])
def test_clipping_is_that_of_fastai_to_the_bit(cbs):
    runs = [learner(clip=.1, cbs=cbs), learner(clip=.1, guard=False, cbs=cbs), learner(cbs=cbs)]
    for o in runs: fit(o, 2)
    assert [len([cb for cb in o.cbs if isinstance(cb, GradientClip)]) for o in runs] == [0, 1, 0]
    assert equal(state(runs[0].model), state(runs[1].model)) and not equal(state(runs[0].model), state(runs[2].model))
    assert min(runs[0].finite_guard.norms) > .1                                       # before clipping


def test_the_guard_changes_no_bit_of_a_healthy_run():
    runs = [learner(), learner(guard=False)]
    for o in runs: fit(o, 2)
    assert equal(state(runs[0].model), state(runs[1].model)) and runs[0].recorder.losses == runs[1].recorder.losses


def test_it_is_off_while_searching_for_a_learning_rate_but_clips(tmp_path):
    clipped = []
    norm = Do('before_step', lambda cb: clipped.append(float(torch.stack([p.grad.norm() for p in cb.model.parameters() if p.grad is not None]).norm())), order=20)
    learn = learner({0: torch.nan}, clip=.01, path=tmp_path, cbs=norm)
    before = state(learn.model)
    with warnings.catch_warnings(): warnings.simplefilter('error', UserWarning); quietly(learn, 'lr_find', num_it=6, show_plot=False, suggest_funcs=())
    assert equal(before, state(learn.model)) and not learn.finite_guard.skips
    assert len(clipped) == 6 and all(o < .0101 or math.isnan(o) for o in clipped)


def test_counts_survive_a_validation_and_a_resumed_fit():
    learn = learner({7: torch.nan})
    fit(learn); quietly(learn, 'validate')
    saved = json.loads(json.dumps(learn.finite_guard.state_dict()))
    assert len(saved['skips']) == 1 and json.dumps(learn.collapse_alarm.state_dict())
    other = learner({7: torch.nan}, cbs=Do('before_fit', lambda cb: None))
    other.do.before_fit = lambda: (other.finite_guard.load_state_dict(saved), other.collapse_alarm.load_state_dict(dict(log=[], told=['loss'])))
    fit(other)
    assert len(other.finite_guard.skips) == 2 and other.finite_guard.skips[0] == saved['skips'][0] and other.collapse_alarm.told == ['loss']


@pytest.mark.parametrize('kw, said', [(dict(clip=0.), 'clip=0.0 would leave no gradient'), (dict(max_in_row=0), 'max_in_row=0 is below 1')])
def test_what_makes_no_sense_is_refused(kw, said):
    with pytest.raises(ValueError, match=said): FiniteGuard(**kw)


# several processes

def _one_of_two(rank, folder):
    os.environ |= dict(WORLD_SIZE='2', RANK=str(rank))
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    guard = FiniteGuard()
    x = torch.randn(2, 3, 8, 8)
    if rank == 1: x[1,0,0,0] = torch.nan
    dls = SimpleNamespace(train=SimpleNamespace(batch_items=lambda i: [f'{rank}_a', f'{rank}_b']))
    guard.learn = SimpleNamespace(xb=(x,), loss=torch.tensor(1.), epoch=0, iter=3, dls=dls, opt=SimpleNamespace(hypers=[dict(lr=1.)]))
    guard.on = True
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        try: guard.after_loss(); skipped = False
        except CancelBatchException: skipped = True
    flag = any_rank(torch.tensor([rank, 0])).tolist()
    (folder/f'{rank}.json').write_text(json.dumps(dict(skipped=skipped, skips=guard.skips, in_row=guard.in_row, told=len(told), flag=flag)))
    torch.distributed.destroy_process_group()


def test_two_processes_skip_the_same_batch_and_each_names_its_own_files(tmp_path):
    ctx = multiprocessing.get_context('fork')
    procs = [ctx.Process(target=_one_of_two, args=(rank, tmp_path)) for rank in (0, 1)]
    for p in procs: p.start()
    for p in procs: p.join(60)
    good,bad = (json.loads((tmp_path/f'{rank}.json').read_text()) for rank in (0, 1))
    assert good['skipped'] and bad['skipped'] and good['flag'] == bad['flag'] == [1, 0] and good['in_row'] == bad['in_row']
    assert (good['skips'][0]['files'], bad['skips'][0]['files']) == ([], ['1_b']) and (good['told'], bad['told']) == (0, 1)


# collapse

def watched(**kw):
    learn = learner(guard=False, cbs=CollapseAlarm(every=2), **kw)
    return learn, fit(learn, 4)


@pytest.mark.parametrize('method', ['bootmae', 'dbot'])
def test_a_healthy_run_on_photographs_rings_no_alarm(method):
    dls = mim_dls(img_size=32, bs=8, crops_per_image=8, num_workers=0, seed=1, device='cpu')
    learn = mim_learner(dls, **tiny, method=method, guard=False, cbs=CollapseAlarm(every=2, settle=20))
    told = fit(learn, 4)
    assert not told and len(log := learn.collapse_alarm.log) >= 20
    assert min(o['target_var'] for o in log) > .2 and min(o['loss'] for o in log) > .05 and max(o['cosine'] for o in list(log)[10:]) < .97


def test_a_teacher_that_says_the_same_of_all_is_told_once():
    learn = learner(method='dbot', guard=False, cbs=CollapseAlarm(every=2))
    with torch.no_grad():
        for p in learn.model.teacher.parameters(): p.fill_(.02)
    told = fit(learn, 8, 5e-3)
    assert len([o for o in told if 'feature targets of different images are alike' in o]) == 1
    assert 'a slower teacher' not in told[0] and 'try a learning rate below 0.005' in told[0]
    assert any('the feature loss is next to nothing' in o for o in told) == (min(o['loss'] for o in learn.collapse_alarm.log) < .005)


def test_images_that_are_all_the_same_are_told_of():
    learn,told = watched(same=True)
    assert any('variance' in o and 'a slower teacher' in o for o in told) and 'target_var' in learn.collapse_alarm.told


def test_predictions_that_ignore_the_image_are_told_of_after_a_while():
    flat = Do('after_pred', lambda cb: setattr(cb.learn, 'pred', tuple(o.mean(0, keepdim=True).expand_as(o) for o in cb.pred)))
    learn = learner(guard=False, cbs=[CollapseAlarm(every=2, settle=10), flat])
    told, = fit(learn, 4)
    assert 'the features predicted for different images are alike' in told and 'after 14 steps' in told


def test_single_images_tell_nothing_of_a_collapse():
    learn = learner(bs=1, guard=False, cbs=CollapseAlarm(every=1, settle=0))
    assert not fit(learn) and not learn.collapse_alarm.log


def test_methods_without_features_have_no_alarm_and_the_switch_turns_all_off():
    assert [type(o) for o in learner(method='mae').cbs if isinstance(o, FiniteGuard|CollapseAlarm)] == [FiniteGuard]
    assert not [o for o in learner(guard=False).cbs if isinstance(o, FiniteGuard|CollapseAlarm|GradientClip)]
    assert [type(o) for o in learner().cbs if isinstance(o, FiniteGuard|CollapseAlarm)] == [FiniteGuard, CollapseAlarm]


def test_likeness_is_the_mean_cosine_where_both_hide_a_patch():
    x,mask = torch.randn(3, 2, 6), torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1]]).bool()
    at = [{j: x[i,k] for k,j in enumerate(mask[i].nonzero()[:, 0].tolist())} for i in range(3)]
    cos = [torch.cosine_similarity(at[a][j], at[b][j], dim=0) for a,b,j in ((0, 1, 0), (0, 2, 1), (1, 2, 2))]
    assert likeness(x, mask).item() == pytest.approx(torch.stack(cos).mean().item(), abs=1e-5)
    assert bad_images(torch.tensor([[1.], [1e4], [1.1e4], [torch.nan]])).tolist() == [False, False, True, True]
