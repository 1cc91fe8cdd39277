"""After an exception or a Ctrl-C at any moment a learner is as good as before: nothing switched on, nothing left behind, and the next fit works."""
import signal

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation

from common import equal, quietly, state
from test_learner import photos_learner
from bootmae_nb.callbacks import ReconstructionLog, StagedTeacher
from bootmae_nb.runs import RunState

events = ['before_fit', 'before_epoch', 'before_train', 'before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step',
          'after_step', 'after_batch', 'after_train', 'before_validate', 'after_validate', 'after_epoch', 'after_fit']


inner = events[3:11]


class Fail(Callback):
    "Raises at an event, before or after the other callbacks have seen it"
    def __init__(self, event, error, order, validating=False):
        self.order = order
        def f():
            if event not in inner or self.learn.training is not validating: raise error
        setattr(self, event, f)


class CPUMixed(MixedPrecision):
    "fastai's mixed precision as it is on a GPU, on a CPU"
    def before_fit(self): self.autocast,self.learn.scaler,self.scales = torch.autocast('cpu', torch.bfloat16), torch.amp.GradScaler('cpu', init_scale=2.), []


def snapshot(learn):
    return dict(cbs=sorted(str(o) for o in learn.cbs), runs={o.run for o in learn.cbs}, model=id(learn.model), loaders=[id(o) for o in learn.dls.loaders],
                logger=learn.logger, call=learn.fit_call, shards=[o.shard for o in learn.dls.loaders], skips=[o.skip for o in learn.dls.loaders],
                autocast=(torch.is_autocast_enabled('cpu'), torch.is_autocast_enabled('cuda')), handlers=[signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
                targets=learn.loss_func.targets, stage=hasattr(learn, 'stage_epochs'), grads=any(p.grad is not None and p.grad.any() for p in learn.model.parameters()),
                batch=learn.xb if hasattr(learn, 'xb') else (None,), grad=torch.is_grad_enabled(), locked=learn.lock.locked())


@pytest.mark.parametrize('order', [-100, 1000], ids=['first', 'last'])
@pytest.mark.parametrize('event', events)
def test_a_failing_event_leaves_nothing_behind(event, order, tmp_path):
    for n,(error,precision) in enumerate(((RuntimeError('broken'), 'fp32'), (KeyboardInterrupt(), 'bf16'))):
        learn = photos_learner(crops=2, precision=precision, cbs=[GradientAccumulation(16)])
        before = snapshot(learn)
        given = [Fail(event, error, order), RunState(tmp_path/str(n), overwrite=True), ReconstructionLog(tmp_path/'pictures')]
        with pytest.raises(type(error)) as e: learn.fit_one_cycle(1, 1e-3, cbs=given)
        assert str(e.value) == str(error), 'without a sentence of its own'
        after = snapshot(learn)
        assert after == before, {k: (before[k], v) for k,v in after.items() if v != before[k]}
        learn.fit_one_cycle(1, 1e-3, cbs=[RunState(tmp_path/str(n), overwrite=True)])
        assert snapshot(learn) == before and len(learn.recorder.values) == 1 and all(v.isfinite().all() for v in state(learn.model).values())


@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_batch'])
def test_validation_and_predictions_too(event):
    learn = photos_learner(crops=2, precision='bf16'); before = snapshot(learn)
    for verb in ('fit', 'validate', 'get_preds'):
        fail = Fail(event, RuntimeError('broken'), 20, validating=True); learn.add_cb(fail)
        with pytest.raises(RuntimeError, match='broken'): quietly(learn, verb, *([1] if verb == 'fit' else []))
        learn.remove_cb(fail)
        after = snapshot(learn) | dict(batch=before['batch'])
        assert after == before, (verb, {k: (before[k], v) for k,v in after.items() if v != before[k]})
    quietly(learn, 'fit', 1)


@pytest.mark.parametrize('event', ['after_pred', 'before_backward', 'before_step', 'after_step'])
def test_fastais_own_mixed_precision_is_switched_off(event):
    learn = photos_learner(crops=2, cbs=CPUMixed()); before = snapshot(learn)
    with pytest.raises(RuntimeError, match='broken'): quietly(learn, 'fit', 1, cbs=Fail(event, RuntimeError('broken'), 5))
    assert snapshot(learn) == before
    w = learn.model.encoder.vit.blocks[0].attn.qkv.weight
    with torch.autocast('cpu', torch.bfloat16): a = torch.nn.functional.linear(torch.ones(1, w.shape[1]), w)
    with torch.no_grad(): w += 1
    with torch.autocast('cpu', torch.bfloat16): b = torch.nn.functional.linear(torch.ones(1, w.shape[1]), w)
    assert not torch.equal(a, b), 'and keeps no old copies of weights'
    quietly(learn, 'fit', 1)


@pytest.mark.parametrize('error', [RuntimeError('broken'), KeyboardInterrupt()])
def test_a_search_for_a_learning_rate_that_breaks_off_gives_the_weights_back(error, tmp_path):
    learn = photos_learner(path=tmp_path)
    quietly(learn, 'fit', 1, 1e-3)
    before,opt = state(learn.model), {k: v.clone() for k,v in next(iter(learn.opt.opt.state.values())).items()}
    class Late(Callback):
        def after_step(self):
            if self.train_iter == 5: raise error
    learn.add_cb(Late())
    with pytest.raises(type(error)): quietly(learn, 'lr_find', num_it=20, show_plot=False, suggest_funcs=())
    learn.remove_cb(Late)
    assert equal(before, state(learn.model)) and equal(opt, next(iter(learn.opt.opt.state.values())))
    assert not [*(tmp_path/'models').iterdir()], 'and takes its files away'
    quietly(learn, 'fit', 1, 1e-3)


def test_a_switched_off_callback_works_again_and_bars_too(tmp_path):
    learn = photos_learner(crops=2, log_pictures=tmp_path)
    learn.add_cb(fail := Fail('after_fit', RuntimeError('x'), 1))
    with pytest.raises(RuntimeError): quietly(learn, 'lr_find', num_it=3, show_plot=False, suggest_funcs=())
    learn.remove_cb(fail)
    quietly(learn, 'fit', 1)
    assert (tmp_path/'epoch_0001.png').exists() and learn._grab_cbs(ProgressCallback)


def test_a_stage_that_breaks_off():
    learn = photos_learner(crops=2, method='dbot', feature_width=48, feature_heads=3, feature_depth=2); before = snapshot(learn)
    cbs = [StagedTeacher(2, folder=False), Fail('after_step', RuntimeError('x'), 90)]
    with pytest.raises(RuntimeError): quietly(learn, 'fit_one_cycle', 2, 1e-3, cbs=cbs)
    assert snapshot(learn) == before
    quietly(learn, 'fit_stages', 1, stages=2, lr=1e-3, folder=False)
