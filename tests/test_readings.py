"""Losses and flags that stay on the device: no step asks for them, and what comes out is to the bit what asking at once gives."""
import itertools
import json
import math
import signal
import warnings
from collections import Counter

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import SGD

from common import equal, quietly, state
from test_distributed import numbered_learner, shared, together
from test_guards import Do, learner
from bootmae_nb.callbacks import LossPart
from bootmae_nb.guards import NonFiniteError
from bootmae_nb.readings import LateRecorder, Readings
from bootmae_nb.runs import RunState, find_state

every = 4
nan,inf = torch.nan, torch.inf


class Spoil(Callback):
    "Bad numbers at some steps, counted over the fit: of images, the loss or gradients"
    order = 12
    def __init__(self, images=(), loss=(), gradient=()): self.images,self.losses,self.gradient = images, loss, gradient
    def before_batch(self):
        if self.training and self.train_iter in self.images:
            x = self.xb[0].clone(); x[1,0,3,3] = nan
            self.learn.xb = (x, *self.xb[1:])
    def after_pred(self):
        if self.training and self.train_iter in self.losses: self.learn.pred = tuple(o*inf for o in self.pred)
    def after_backward(self):
        if self.train_iter in self.gradient: next(self.model.encoder.parameters()).grad.fill_(inf)
class SpoilImages(Callback):
    "Bad images, before the targets are made"
    order = 10
    def __init__(self, at): self.at = at
    def before_batch(self):
        if self.training and self.train_iter in self.at:
            x = self.learn.xb[0].clone(); x[1,0,3,3] = nan
            self.learn.xb = (x,)


def moments(learn):
    "The state of the optimiser; that of a parameter without any is zero"
    return {(i, k): v.clone() for i,s in enumerate(learn.opt.opt.state[p] for g in learn.opt.opt.param_groups for p in g['params']) for k,v in s.items()}


def outcome(learn):
    rec,guard = learn.recorder, learn.finite_guard
    return dict(model=state(learn.model), moments=moments(learn), losses=[float(o) for o in rec.losses], lrs=list(rec.lrs), iters=list(rec.iters),
                values=[[v if v is None or math.isfinite(v) else str(v) for v in o[:-1]] for o in rec.values], skips=guard.skips, in_row=guard.in_row, norms=list(guard.norms),
                smooth=float(learn.smooth_loss), looks=list(learn.collapse_alarm.log) if hasattr(learn, 'collapse_alarm') else [], count=rec.smooth_loss.count)


def run(read_every, n=2, metrics=True, cbs=(), told=None, **kw):
    "The outcome of a fit, and its warnings"
    bad = {k: kw.pop(k, ()) for k in ('images', 'loss', 'gradient')}
    learn = learner(read_every=read_every, cbs=[SpoilImages(bad['images']), Spoil((), bad['loss'], bad['gradient']), *cbs], **kw)
    learn.recorder.train_metrics = metrics
    if hasattr(learn, 'collapse_alarm'): learn.collapse_alarm.every = 3
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        quietly(learn, 'fit_one_cycle', n, 1e-2)
    return learn, [str(o.message) for o in seen if 'skipped' in str(o.message)]


def differences(a, b):
    a,b = outcome(a), outcome(b)
    return [k for k in a if not (equal(a[k], b[k]) if k in ('model', 'moments') else a[k] == b[k])]
