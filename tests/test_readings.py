"""Losses and flags that stay on the device: no step asks for them, and what comes out is to the bit what asking at once gives."""
import warnings
from collections import Counter
from functools import partial, partialmethod

import pytest
import torch
from fastai.callback.core import Callback, CancelFitException, CancelTrainException
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import Recorder
from fastai.metrics import AvgMetric
from fastai.optimizer import OptimWrapper, SGD
from torch.utils._python_dispatch import TorchDispatchMode

from common import equal, quietly, state
from test_distributed import numbered_learner, shared, together
from test_guards import learner
from bootmae_nb.guards import NonFiniteError
from bootmae_nb.readings import Readings
from bootmae_nb.runs import RunState, find_state


class SpoilImages(Callback):
    "A NaN in an image at some steps of the fit, before the targets are made"
    order = 10
    def __init__(self, at): self.at = at
    def before_batch(self):
        if not self.training or self.train_iter not in self.at: return
        x = self.learn.xb[0].clone(); x[-1,0,3,3] = torch.nan
        self.learn.xb = (x,)


class SpoilLoss(Callback):
    "Predictions, and so a loss, that are infinite, or gradients, at some steps of the fit"
    order = 12
    def __init__(self, loss, gradient): self.at,self.gradient = loss, gradient
    def after_pred(self):
        if self.training and self.train_iter in self.at: self.learn.pred = tuple(o*torch.inf for o in self.pred)
    def after_backward(self):
        if self.train_iter in self.gradient: next(p for p in self.model.parameters() if p.grad is not None).grad.fill_(torch.inf)


def spoilers(images=(), loss=(), gradient=()): return [SpoilImages(images), SpoilLoss(loss, gradient)]


def moments(learn):
    "State of the optimiser by parameter; one of which no step has been made has none"
    params = [p for g in learn.opt.opt.param_groups for p in g['params']]
    return {f'{i} {k}': v.clone() for i,p in enumerate(params) for k,v in learn.opt.opt.state.get(p, {}).items()}


def outcome(learn):
    "All that a fit leaves"
    rec,guard = learn.recorder, learn.finite_guard
    return dict(model=state(learn.model), moments=moments(learn), losses=[float(o) for o in rec.losses], lrs=[*rec.lrs], iters=rec.iters, count=rec.smooth_loss.count,
                values=[[*map(str, o)] for o in rec.values], smooth=float(learn.smooth_loss), skips=guard.skips, in_row=guard.in_row, norms=[*guard.norms],
                looks=[*learn.collapse_alarm.log] if hasattr(learn, 'collapse_alarm') else [])


def differing(a, b): return [k for k,v in a.items() if not (equal(v, b[k]) if k in ('model', 'moments') else v == b[k])]


def prepared(read_every, bad=None, cbs=(), metrics=True, **kw):
    learn = learner(read_every=read_every, cbs=[*spoilers(**bad or {}), *cbs], **kw)
    learn.recorder.train_metrics = metrics
    if hasattr(learn, 'collapse_alarm'): learn.collapse_alarm.every = 3
    return learn


def fitted(read_every, bad=None, epochs=2, **kw):
    "The learner after a fit, and what was told"
    learn = prepared(read_every, bad, **kw)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        quietly(learn, 'fit_one_cycle', epochs, 1e-2)
    return learn, [str(o.message) for o in told if 'skipped' in str(o.message)]


# equal to reading at once; 12 steps in two epochs, read after 1, 4, 6 (end of the epoch), 8 and 12

@pytest.mark.parametrize('bad,kw', [
    ({}, {}), (dict(images=[0]), {}), (dict(images=[0], loss=[1], gradient=[2]), {}), (dict(gradient=[5], images=[11]), dict(clip=.5)),
    (dict(images=[4, 6], loss=[5, 7]), {}), (dict(images=[1], loss=[6], gradient=[9, 10]), dict(precision='bf16', clip=1.)),
    (dict(images=[3], loss=[5], gradient=[7, 8]), dict(method='mae')), (dict(images=[3], loss=[5], gradient=[7, 8]), dict(method='dbot', metrics=False)),
    (dict(images=[2]), dict(ema=.3, drop_path=.2))])
def test_the_outcome_is_to_the_bit_that_of_reading_at_once(bad, kw):
    (now,told),(late,told_late) = fitted(1, bad, **kw), fitted(4, bad, **kw)
    assert late.finite_guard.late and not now.finite_guard.late
    assert differing(outcome(now), outcome(late)) == [] and told == told_late
    assert len(told) == len(now.finite_guard.skips) == sum(map(len, bad.values()))
    assert len(late.recorder.losses) == 12 - len(bad.get('images', [])) - len(bad.get('loss', []))
    assert late.readings is late.left_out is late.no_step is late.opt.opt.found_inf is None


def test_a_first_step_that_is_skipped_makes_no_moments_to_speak_of():
    (now,_),(late,_) = (fitted(n, dict(images=range(3)), 1, n=12) for n in (1, 9))
    assert equal(state(now.model), state(late.model)) and not moments(now) and not any(v.any() for v in moments(late).values())


# who reads

def _counted(x, seen, name, f, *args, **kw): seen[name] += 1; return f(x, *args, **kw)


class Reads(TorchDispatchMode):
    "Counts what asks a tensor for its numbers"
    methods = 'tolist item numpy cpu __bool__ __float__ __int__ __index__ __array__'.split()
    def __init__(self): super().__init__(); self.seen = Counter()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ('_local_scalar_dense', 'is_nonzero', 'equal', 'nonzero', 'masked_select', '_unique2'): self.seen[name] += 1
        return func(*args, **kwargs or {})
    def __enter__(self):
        self.old = {k: getattr(torch.Tensor, k) for k in self.methods}
        for k,f in self.old.items(): setattr(torch.Tensor, k, partialmethod(_counted, self.seen, k, f))
        return super().__enter__()
    def __exit__(self, *args):
        for k,f in self.old.items(): setattr(torch.Tensor, k, f)
        return super().__exit__(*args)


def reads(learn):
    "Reads in each training step of a fit"
    res,step = [], learn.one_batch
    def watched(i, b):
        with Reads() as r: step(i, b)
        if learn.training: res.append(sum(r.seen.values()))
    learn.one_batch = watched
    quietly(learn, 'fit', 1, 1e-3)
    return res


@pytest.mark.parametrize('kw', [dict(clip=1.), dict(method='mae', precision='bf16'), dict(method='dbot'), dict(guard=False)])
def test_no_step_reads_but_every_so_many(kw):
    late,now = (reads(prepared(n, dict(images=[3], gradient=[5]) if kw.get('guard', True) else {}, bs=2, **kw)) for n in (4, 1))
    assert [bool(o) for o in late] == [i == 0 or i % 4 == 3 for i in range(12)]
    assert min(now) > 0 and sum(now) >= 12*(3 if kw.get('guard', True) else 1)


def test_validation_reads_at_its_end():
    learn = prepared(50); seen,step = [], learn.one_batch
    def watched(i, b):
        with Reads() as r: step(i, b)
        seen.append((learn.training, sum(r.seen.values())))
    learn.one_batch = watched
    quietly(learn, 'fit', 1, 1e-3)
    assert not [n for training,n in seen if n and not training] and learn.recorder.values[0][3] is not None


@pytest.mark.cuda
@pytest.mark.parametrize('kw', [dict(), dict(method='mae', clip=1.), dict(method='dbot', precision='bf16')])
def test_cuda_waits_in_no_step_but_every_so_many(kw):
    learn = prepared(None, dict(images=[3], gradient=[5]), bs=2, **kw)
    learn.dls.to('cuda')                               # the model follows when the fit has begun
    if 'precision' in kw: learn.to_fp32().to_bf16()
    step = learn.one_batch
    def watched(i, b):
        torch.cuda.set_sync_debug_mode('error' if learn.training and i > 1 else 'default')
        try: step(i, b)
        finally: torch.cuda.set_sync_debug_mode('default')
    learn.one_batch = watched
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quietly(learn, 'fit', 1, 1e-3)
    assert learn.finite_guard.late and [o['batch'] for o in learn.finite_guard.skips] == [3, 5] and all(v.isfinite().all() for v in learn.model.state_dict().values())


def test_the_first_fit_on_a_gpu_waits_too(monkeypatch):
    "It begins with the model on the CPU, and fastai moves it to the loaders' device"
    learn,made = learner(), []                           # on MPS fused AdamW knows no flags, see torch's `FusedAdamWKernelImpl.mm`
    monkeypatch.setattr('bootmae_nb.learner.Readings', lambda every: made.append(every))
    for device,n in ('cuda', None), (torch.device('cuda', 0), None), ('cuda', 7), ('cpu', None), ('cpu', 4), ('mps', None), ('mps', 50):
        learn.dls._device,learn.read_every,learn.fit_call = device, n, {}
        with learn._reading(): pass
    assert made == [50, 50, 7, 4] and next(learn.model.parameters()).device.type == 'cpu'


def test_who_asks_in_a_step_gets_what_is_true_then():
    seen = {}
    class Ask(Callback):
        order = 90
        def after_batch(self):
            if self.training: seen[n].append((len(self.recorder.losses), float(self.recorder.losses[-1]), float(self.recorder.smooth_loss.value), len(self.recorder.lrs)))
    for n in (1, 5):
        seen[n] = []
        learn,_ = fitted(n, dict(images=[2], gradient=[3]), cbs=[Ask()], epochs=1)
    assert seen[1] == seen[5] and len(seen[1]) == 6


def test_a_callback_that_logs_each_step_gets_the_loss_of_each_step():
    "As those for W&B, Comet and TensorBoard: they take it from the learner, from the first step on"
    seen = {}
    class Log(Callback):
        order = 51
        def after_batch(self):
            if self.training: seen[n].append(float(self.smooth_loss))
    for n in (1, 5):
        seen[n] = []
        fitted(n, dict(images=[2], gradient=[3]), cbs=[Log()])
    assert seen[1] == seen[5] and len(seen[1]) == 12


def test_the_progress_bar_shows_what_was_read_last_and_does_not_ask(monkeypatch):
    learn,asked,shown,read = prepared(4), [], [], Readings.read
    monkeypatch.setattr(Readings, 'read', lambda self: (asked.append(learn.train_iter) if self.waiting else None, read(self))[1])
    class Look(Callback):
        order = 61
        def after_batch(self):
            if self.training: shown.append(self.learn.progress.pbar.comment)
    learn.fit(2, 1e-3, cbs=Look())
    assert asked == [1, 4, 6, 6, 8, 12, 12]                        # step 1, every fourth, and the end of training and validation
    assert shown == [f'{learn.recorder.losses[i]:.4f}' for i in (0, 0, 0, 0, 3, 3, 5, 5, 7, 7, 7, 7)]
    learn.read_every = 1; shown.clear(); learn.fit(1, 1e-3, cbs=Look())
    assert shown == [f'{o:.4f}' for o in learn.recorder.losses]


# where waiting is not possible

class OwnAdamW(torch.optim.AdamW):
    "One whose step pays no heed to flags"
    def step(self, closure=None): self.found_inf = None; return super().step(closure)


@pytest.mark.parametrize('kw', [dict(cbs=[GradientAccumulation(8)]), dict(opt=partial(OptimWrapper, opt=torch.optim.AdamW)), dict(opt=SGD),
                                dict(opt=partial(OptimWrapper, opt=partial(torch.optim.SGD, fused=True, momentum=.9))),
                                dict(opt=partial(OptimWrapper, opt=partial(OwnAdamW, fused=True))),
                                dict(metric=[AvgMetric(lambda *_: torch.tensor(1.))]), dict(recorder=Recorder())],
                         ids=['accumulation', 'not fused', "fastai's", "another's", "one's own", 'metric', 'recorder'])
def test_where_a_decision_cannot_wait_it_does_not(kw):
    def run(n):
        learn = prepared(n, dict(images=[3], gradient=[4]), cbs=kw.get('cbs', ()), metrics='metric' in kw)
        learn.metrics = [*learn.metrics, *kw.get('metric', [])]
        if 'opt' in kw: learn.opt_func = kw['opt']
        if 'recorder' in kw: learn.remove_cb(Recorder); learn.add_cb(kw['recorder'])
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); quietly(learn, 'fit', 2, 1e-3)
        return learn
    now,late = run(1), run(4)
    assert not late.finite_guard.late and len(late.finite_guard.skips) >= 1 and now.finite_guard.skips == late.finite_guard.skips
    assert equal(state(now.model), state(late.model)) and [*map(float, now.recorder.losses)] == [*map(float, late.recorder.losses)]


def test_looking_for_a_learning_rate_asks_in_each_step(tmp_path):
    found = []
    for n in (1, 50):
        learn = prepared(n, path=tmp_path)
        found.append(quietly(learn, 'lr_find', num_it=8, show_plot=False)); assert len(learn.recorder.losses) == 8 and learn.readings is None
    assert found[0] == found[1]


# errors, stops

def stopped(read_every, error, bad, **kw):
    learn = prepared(read_every, bad, **kw)
    with warnings.catch_warnings(record=True) as told, pytest.raises(error) as e:
        warnings.simplefilter('always')
        quietly(learn, 'fit', 4, 1e-2)
    return learn, str(e.value), [str(o.message) for o in told if 'skipped' in str(o.message) or 'in a row' in str(o.message)]


@pytest.mark.parametrize('bad,said', [(dict(images=range(8, 99)), '5 batches in a row could not be used, the last in epoch 2, batch 0: 1 of its 4 images'),
                                      (dict(gradient=range(8, 99)), '5 steps in a row could not be used, the last in epoch 2, batch 0: the gradient is not finite')])
def test_too_many_in_a_row_stop_the_run_a_little_later_and_change_nothing(bad, said):
    (now,text,told),(late,text_late,told_late) = (stopped(n, NonFiniteError, bad) for n in (1, 4))
    assert text_late == text and text.startswith(said) and text.endswith(('with clip=1.', 'clip=1.', 'what makes tensors of them.'))
    keep = lambda s: {k: v for k,v in s.items() if not (k.startswith('feature_') and 'gradient' in bad)}         # its mean is of the batches, whose losses are fine
    assert equal(keep(state(now.model)), keep(state(late.model))) and equal(moments(now), moments(late)) and now.train_iter == 12 and late.train_iter in (16, 18)
    assert late.finite_guard.skips[:5] == now.finite_guard.skips and late.readings is None and late.opt.opt.found_inf is None


def test_good_steps_after_too_many_bad_ones_do_not_hide_them():
    learn,text,_ = stopped(6, NonFiniteError, dict(images=range(6, 11)))
    assert 'the last in epoch 1, batch 4' in text and learn.train_iter == 12 and len(learn.finite_guard.skips) == 5


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_what_waits_is_told_when_a_run_is_stopped(error):
    class Stop(Callback):
        order = 95
        def after_batch(self):
            if self.training and self.train_iter == 6 + 3: raise error('enough')
    learn,text,told = stopped(50, error, dict(images=[7]), cbs=[Stop()])
    assert text == 'enough' and len(told) == 1 and 'epoch 1, batch 1 is skipped' in told[0] and len(learn.recorder.losses) == 8 and len(learn.finite_guard.skips) == 1
    assert learn.readings is None and [len(learn.finite_guard.norms), learn.finite_guard.in_row['batches']] == [8, 0]
    learn,text,told = stopped(50, error, dict(images=range(3, 9)), cbs=[Stop()])
    assert text == 'enough' and '5 batches in a row could not be used' in told[-1]


@pytest.mark.parametrize('error', [CancelTrainException, CancelFitException])
def test_an_epoch_or_a_fit_that_another_callback_ends(error):
    class Stop(Callback):
        order = 95
        def after_batch(self):
            if self.training and self.iter == 3: raise error
    (now,told),(late,told_late) = (fitted(n, dict(images=[2]), cbs=[Stop()]) for n in (1, 50))
    assert differing(outcome(now), outcome(late)) == [] and told == told_late and len(told) == 1


@pytest.mark.parametrize('last', [5, 10])
def test_a_state_that_is_saved_within_a_window_is_whole(last, tmp_path):
    class Stop(Callback):
        order = 120
        def after_batch(self):
            if self.training and self.train_iter == last: raise RuntimeError('stopped here')
    bad = dict(images=[1, 4], gradient=[3, 9])
    whole,part,rest = (prepared(50, bad, cbs=cbs, drop_path=.2) for cbs in ([], [Stop()], []))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quietly(whole, 'fit_one_cycle', 2, 1e-2)
        with pytest.raises(RuntimeError, match='stopped here'): quietly(part, 'fit_one_cycle', 2, 1e-2, cbs=RunState(tmp_path, steps=1, minutes=None))
        assert find_state(tmp_path)[1]['train_iter'] == last
        quietly(rest, 'resume', tmp_path)
    a,b = outcome(whole), outcome(rest)
    assert a.pop('norms')[-len(b['norms']):] == b.pop('norms')                # those of earlier steps are not saved
    assert differing(a, b) == [] and rest.finite_guard.late and len(rest.finite_guard.skips) == 4


# what else looks at losses

def test_fastais_callbacks_see_what_they_saw(tmp_path, monkeypatch):
    import fastai.callback.progress as progress
    def run(n):
        cbs = [SaveModelCallback(fname=f'best_{n}'), EarlyStoppingCallback(patience=9), ReduceLROnPlateau(patience=0, min_delta=9.)]
        cbs += [CSVLogger(f'log_{n}.csv'), ShowGraphCallback()]
        learn = prepared(n, dict(images=[2]), path=tmp_path, cbs=cbs)
        graphs = []
        monkeypatch.setattr(progress.ProgressCallback, 'before_fit', graph(progress.ProgressCallback.before_fit, graphs))
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); learn.fit(3, 1e-2)
        learn.recorder.plot_loss(skip_start=0)
        rows = [o.rsplit(',', 1)[0] for o in (tmp_path/f'log_{n}.csv').read_text().splitlines()]
        return learn, graphs, rows
    def graph(old, graphs):
        def f(self): old(self); self.mbar.update_graph = lambda g, *a: graphs.append([[*map(float, y)] for _,y in g])
        return f
    before = progress.ProgressCallback.before_fit
    (now,g1,rows1) = run(1)
    monkeypatch.setattr(progress.ProgressCallback, 'before_fit', before)
    (late,g2,rows2) = run(4)
    assert g1 == g2 and rows1 == rows2 and len(rows1) == 4
    assert differing(outcome(now), outcome(late)) == []


@pytest.mark.parametrize('n', [0, -3])
def test_what_makes_no_sense_is_refused(n):
    with pytest.raises(ValueError, match=f'read_every={n} is below 1'): learner(read_every=n)


# several processes

def test_two_processes_leave_out_the_same_batches_and_name_their_own(tmp_path):
    "Bad numbers in the second process only; the first one looks at its losses when it likes"
    class Look(Callback):
        order = 95
        def after_batch(self):
            if self.training and self.iter == 1: assert self.learn.recorder.losses
    def train(rank):
        res = []
        for n in (1, 3):
            bad = dict(images=[1], loss=[3]) if rank else {}
            learn = numbered_learner(4, read_every=n, cbs=[*spoilers(**bad, gradient=[5]), *([Look()] if n > 1 and not rank else [])])
            learn.recorder.train_metrics = True
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter('always')
                shared(learn, 'fit', 2, 1e-3)
            res.append((outcome(learn), len([o for o in told if 'skipped' in str(o.message)]), learn.finite_guard.late))
        return res
    a,b = together(train, tmp_path)
    for (now,told,_),(late,told_late,waits) in (a, b): assert waits and differing(now, late) == [] and told == told_late
    assert differing(a[1][0], b[1][0]) == ['skips', 'looks'] and [[o['images'] for o in r[1][0]['skips']] for r in (a, b)] == [[0, 0, 4], [1, 4, 4]]


def test_an_error_ends_all_processes_after_the_same_step(tmp_path):
    class Look(Callback):
        order = 95
        def after_batch(self):
            if self.training: assert len(self.learn.recorder.losses) == 1
    def fails(rank):
        learn = numbered_learner(4, read_every=3, cbs=[*spoilers(images=range(1, 99) if rank else ()), *([] if rank else [Look()])])
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); shared(learn, 'fit', 4, 1e-3)
    def both(rank):
        try: fails(rank)
        except NonFiniteError as e: return str(e)
    a,b = together(both, tmp_path)
    assert 'the last in epoch 1, batch 1: another process' in a and 'the last in epoch 1, batch 1: 1 of its 4 images' in b
