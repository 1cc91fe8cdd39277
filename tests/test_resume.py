"""A run that was killed goes on as if it had not been: to the bit, in mid-epoch, with everything that takes part."""
import json
import os
import random
import shutil
import signal
import time
import warnings
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation
from fastai.torch_core import get_model

from common import equal, quietly, state
from forks import run_forked
from bootmae_nb import checkpoints, cli, runs
from bootmae_nb.checkpoints import load_model
from bootmae_nb.data import mim_dls
from bootmae_nb.images import sample_photo, sample_photos
from bootmae_nb.learner import mim_learner
from bootmae_nb.masking import make_mask
from bootmae_nb.runs import ResumeError, RunState, find_state
from bootmae_nb.vit import make_encoder

tiny = dict(arch='vit_tiny_patch16_224', width=32, depth=2, heads=2, patch_size=8, drop_path=.2)
small = dict(bootmae=dict(pixel_width=32), mae=dict(pixel_width=32, pixel_depth=1, pixel_heads=2), dbot=dict(feature_width=32, feature_depth=1, feature_heads=2))


def digest(*tensors):
    h = blake2b(digest_size=8)
    for t in tensors: h.update(t.detach().as_subclass(torch.Tensor).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


class Journal(Callback):
    "One line for each step: what went in, what came out, and the state after it; on disk at once, or in memory"
    order = 80
    def __init__(self, file=None): self.file,self.lines = file, []
    def after_batch(self):
        if not self.training: return
        m,opt = get_model(self.model), self.opt
        line = dict(epoch=self.epoch, batch=self.iter, step=self.train_iter, images=digest(self.learn.xb[0]), mask=digest(self.learn.xb[1]),
                    items=[str(o) for o in self.dls.train.batch_items(self.iter)], lr=opt.hypers[-1]['lr'], mom=opt.hypers[-1]['mom'], wd=opt.hypers[0]['wd'],
                    loss=self.learn.loss.item(), smooth=float(self.learn.smooth_loss), weight=self.loss_func.feature_weight, model=digest(*m.state_dict().values()),
                    teacher=digest(*m.teacher.state_dict().values()) if m.teacher is not None else '',
                    scale=self.learn.scaler.get_scale() if hasattr(self.learn, 'scaler') else 1,
                    stage=getattr(getattr(self.learn, 'staged_teacher', None), 'stage', None))
        self.lines.append(line)
        if self.file:
            with open(self.file, 'a') as f: f.write(json.dumps(line) + '\n')


class KillAt(Callback):
    "Ends its own process as a power cut would"
    order = 110
    def __init__(self, epoch, batch, event='after_batch', number=signal.SIGKILL): self.at,self.event,self.number = (epoch, batch), event, number
    def _kill(self, event):
        if self.training and event == self.event and (self.epoch, self.iter) == self.at: os.kill(os.getpid(), self.number)
    def before_step(self): self._kill('before_step')
    def after_batch(self): self._kill('after_batch')


def learner(method='bootmae', workers=0, cbs=(), images=None, seed=1, **kw):
    dls = mim_dls(images, img_size=32, bs=8, crops_per_image=4, num_workers=workers, seed=seed, device='cpu')
    return mim_learner(dls, method=method, cbs=[*cbs], **tiny | small[method] | kw)


fits = dict(short=lambda learn, **kw: learn.fit_one_cycle(1, 1e-2, **kw), one_cycle=lambda learn, **kw: learn.fit_one_cycle(3, 1e-2, **kw),
            paper=lambda learn, **kw: learn.fit_paper(3, base_lr=.1, **kw),
            stages=lambda learn, **kw: learn.fit_stages(2, stages=2, lr=1e-2, folder=False, **kw), recipe=lambda learn, **kw: learn.fit_recipe('mae_base_800', 3, **kw))


def train(folder, file, fit, kill=None, steps=2, resume=False, **kw):
    "A run with a journal; killed at a place, or gone on with"
    learn = learner(cbs=[Journal(file), *([KillAt(*kill)] if kill else [])], **kw)
    with learn.no_bar(), learn.no_logging():
        if resume: learn.resume(folder)
        else: fits[fit](learn, cbs=RunState(folder, steps=steps, minutes=None))


def journal(file): return [json.loads(o) for o in Path(file).read_text().splitlines()]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "Journals of runs without a stop"
    made = {}
    def get(fit='one_cycle', **kw):
        key = fit, repr(sorted(kw.items(), key=str))
        if key not in made:
            file = tmp_path_factory.mktemp('whole')/'journal'
            assert run_forked(train, file.parent/'run', file, fit, **kw) == 0
            made[key] = journal(file)
        return made[key]
    return get


def check(tmp_path, whole, fit, kill, workers=0, signalled=False, **kw):
    "Killed, gone on with: each step that was made after it, and those that had to be made again, as in the run without a stop"
    lines = whole(fit, **kw)
    a,b = tmp_path/'killed', tmp_path/'rest'
    assert run_forked(train, tmp_path/'run', a, fit, kill, workers=workers, **kw) == -signal.SIGKILL
    assert run_forked(train, tmp_path/'run', b, fit, resume=True, workers=workers, **kw) == 0
    first,rest = journal(a), journal(b)
    n = len(lines) - len(rest)
    assert len(first) >= n and len(rest) > 0 and first == lines[:len(first)], 'until it was killed'
    assert rest == lines[n:]
    assert len(first) - n <= 2, 'at most the steps since the last state are made again'


def n_batches():
    dl = learner().dls.train
    return len(dl)


# ---- killed at any moment

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('where', ['first', 'middle', 'last'])
def test_killed_in_an_epoch_and_gone_on_with_to_the_bit(where, workers, tmp_path, whole):
    n = n_batches()
    assert n >= 4
    check(tmp_path, whole, 'one_cycle', (1, dict(first=0, middle=n//2, last=n - 1)[where]), workers)


@pytest.mark.parametrize('fit,method,kill', [('paper', 'mae', (2, 1)), ('recipe', 'mae', (1, 3)), ('stages', 'dbot', (2, 1)),
                                             ('one_cycle', 'bootmae', (1, 2, 'before_step'))])
def test_killed_under_every_schedule(fit, method, kill, tmp_path, whole): check(tmp_path, whole, fit, kill, method=method)


def test_bf16_on_a_cpu(tmp_path, whole): check(tmp_path, whole, 'one_cycle', (1, 1), precision='bf16')


def saving(folder, file, n):
    "A run that is killed in the middle of the `n`-th thing that it does to a file while it saves"
    seen = [0]
    def hit(half=None):
        seen[0] += 1
        if seen[0] == n:
            if half: half()
            os.kill(os.getpid(), signal.SIGKILL)
    def before(f):
        def _f(*args, **kw): hit(); return f(*args, **kw)
        return _f
    def halved(f):
        def _f(tensors, path, **kw):
            f(tensors, path, **kw)
            hit(lambda: os.truncate(path, os.path.getsize(path)//2))
        return _f
    runs.save_file,checkpoints.save_file = halved(runs.save_file), halved(checkpoints.save_file)
    os.fsync,os.replace,Path.unlink,Path.write_text = map(before, (os.fsync, os.replace, Path.unlink, Path.write_text))
    train(folder, file, 'short', steps=1)


saves = [*range(12, 40, 2), *range(41, 53, 2)] # writes, flushes and renames of a run, before each of which it is killed


@pytest.mark.parametrize('points', [saves[::2], pytest.param(saves[1::2], marks=pytest.mark.slow)], ids=['ten times', 'ten more'])
def test_killed_while_saving(points, tmp_path, whole):
    lines = whole('short')
    for n in points:
        here = tmp_path/str(n)
        assert run_forked(saving, here/'run', here.with_suffix('.a'), n) == -signal.SIGKILL, n
        assert run_forked(train, here/'run', here.with_suffix('.b'), 'short', resume=True) == 0, n
        rest = journal(here.with_suffix('.b'))
        assert rest == lines[len(lines) - len(rest):], n
        left = [o.name for o in (here/'run').rglob('*') if o.is_file() and o.suffix not in ('.json', '.safetensors')]
        assert len(left) <= 1 and len([*(here/'run'/'state').glob('[0-9]*.safetensors')]) == 2, 'leftovers are swept'


# ---- stopped by a signal

def signalled(folder, file, workers, number, group):
    learn = learner(cbs=[Journal(file)], workers=workers)
    class Tell(Callback):
        order = 79
        def before_step(self):
            if (self.epoch, self.iter) == (1, 1): (os.killpg if group else os.kill)(os.getpgrp() if group else os.getpid(), number)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-2, cbs=[Tell(), RunState(folder, minutes=None)])


@pytest.mark.parametrize('number,status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize('workers', [0, 2])
def test_a_signal_to_all_processes_finishes_the_step_and_saves(number, status, workers, tmp_path, whole):
    lines,start = whole('one_cycle'), time.monotonic()
    assert run_forked(signalled, tmp_path/'run', tmp_path/'a', workers, number, True) == status
    assert len(journal(tmp_path/'a')) == n_batches() + 2
    info = find_state(tmp_path/'run')[1]
    assert (info['epoch'], info['batch'], info['finished']) == (1, 2, False) and time.monotonic() - start < 15
    learn = learner(cbs=[Journal(tmp_path/'b')], workers=workers)
    with pytest.raises(ResumeError, match='objects|callbacks|cbs'): learn.resume(tmp_path/'run')
    class Tell(Callback): pass
    quietly(learn, 'resume', tmp_path/'run', cbs=Tell())
    assert journal(tmp_path/'b') == lines[n_batches() + 2:]


def test_a_signal_in_validation(tmp_path, whole):
    lines = whole('one_cycle')
    class Tell(Callback):
        def after_batch(self):
            if not self.training and self.epoch == 1: os.kill(os.getpid(), signal.SIGINT)
    learn = learner(cbs=[Tell()])
    learn.recorder.train_metrics = True
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match='stopped in epoch 2, after batch'): quietly(learn, 'fit_one_cycle', 3, 1e-2, cbs=RunState(tmp_path))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    rest,one = learner(cbs=[Journal()]), learner()
    rest.recorder.train_metrics = one.recorder.train_metrics = True
    quietly(rest, 'resume', tmp_path); quietly(one, 'fit_one_cycle', 3, 1e-2)
    assert rest.journal.lines == lines[2*n_batches():]
    assert [[*o] for o in rest.recorder.values] == [[*o] for o in one.recorder.values] and len(one.recorder.values) == 3


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    class Twice(Callback):
        def before_batch(self):
            if self.iter == 1:
                os.kill(os.getpid(), signal.SIGINT); time.sleep(1.1); os.kill(os.getpid(), signal.SIGINT); time.sleep(.1)
                self.learn.reached = True
    learn = learner(cbs=[Twice()])
    with pytest.raises(KeyboardInterrupt): quietly(learn, 'fit_one_cycle', 1, 1e-2, cbs=RunState(tmp_path))
    assert not hasattr(learn, 'reached') and find_state(tmp_path)[1]['train_iter'] == 0
    learn.remove_cb(Twice)
    quietly(learn, 'fit_one_cycle', 1, 1e-2, cbs=RunState(tmp_path, overwrite=True))


# ---- everything that is saved is needed

class CPUScaler(MixedPrecision):
    "Mixed precision with a loss scale that grows, on a CPU"
    def before_fit(self):
        self.autocast,self.learn.scaler,self.scales = torch.autocast('cpu', torch.bfloat16), torch.amp.GradScaler('cpu', init_scale=2., growth_interval=3), []


class Draws(Callback):
    "Draws from the three global generators at the start of each epoch, and changes a setting of the optimiser once"
    order = 5
    def __init__(self): self.seen = []
    def before_epoch(self): self.seen.append((self.epoch, random.random(), np.random.randn(), torch.rand(1).item()))
    def after_epoch(self):
        if self.epoch == 0: self.opt.set_hyper('wd', .3)


class Counts(Callback):
    "A callback of a user's own, with a state"
    def __init__(self): self.n = 0
    def after_batch(self): self.n += self.training
    def state_dict(self): return dict(n=self.n)
    def load_state_dict(self, d): self.n = d['n']


class Poison(Callback):
    "Two batches that hold NaN"
    order = 12
    def before_batch(self):
        if self.training and (self.epoch, self.iter) in ((0, 1), (0, 2)): self.learn.xb = (self.xb[0]*float('nan'), *self.xb[1:])


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('photos')
    for p in sample_photos(): sample_photo(p.name).resize((48, 48)).save(folder/f'{p.name}.png')
    return folder


class StopAt(Callback):
    "Stops a run, as an exception would, after the state was saved; without a place never, as a fit that is gone on with wants one of the name"
    order = 120
    def __init__(self, *at): self.at = at
    def after_batch(self):
        if self.training and (self.epoch, self.iter) == self.at: raise RuntimeError('stopped here')


class Spoil(Callback):
    "A file that cannot be read for a while"
    def __init__(self, file): self.file,self.good = file, file.read_bytes()
    def before_fit(self): self.file.write_bytes(self.good[:60])
    def after_train(self): self.file.write_bytes(self.good)


def rich(photos, *cbs, n=1):
    "A learner in which everything takes part that a run can consist of"
    dls = mim_dls(photos, img_size=32, bs=8, crops_per_image=4, num_workers=0, seed=1, device='cpu', cache=0)
    learn = mim_learner(dls, cbs=[Journal(), GradientAccumulation(16), CPUScaler(), Draws(), Counts(), Poison(), *cbs], ema=.9, **tiny | small['bootmae'])
    learn.recorder.train_metrics,learn.collapse_alarm.every = True, 2
    random.seed(n); np.random.seed(n); torch.manual_seed(n)
    return learn


def outcome(learn, folder):
    "All that a run leaves"
    rec = learn.recorder
    best = json.loads((folder/'best.json').read_text())['best']
    return dict(skips=learn.finite_guard.skips, looks=list(learn.collapse_alarm.log), lines=learn.journal.lines[-6:], draws=learn.draws.seen[-1:],
                values=[[*o] for o in rec.values], losses=[float(o) for o in rec.losses], lrs=rec.lrs, iters=rec.iters,
                hps={k: [float(o) for o in v] for k,v in getattr(rec, 'hps', {}).items()}, counts=learn.counts.n, best=best,
                weights={k: v.clone() for k,v in learn.model.state_dict().items()})


def same(a, b): return all(equal(v, b[k]) if k == 'weights' else v == b[k] for k,v in a.items())


@pytest.fixture(scope='module')
def rich_run(photos, tmp_path_factory):
    "A second fit of a session, whole and stopped in mid-epoch and in mid-accumulation: outcome, folder, and where"
    results = []
    for stop in (None, (1, 3)):
        folder = tmp_path_factory.mktemp('rich')
        learn = rich(photos)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            quietly(learn, 'fit', 1, 1e-3)
            learn.add_cb(Spoil(learn.dls.train.dataset.items[0]))
            extra = [StopAt(*stop)] if stop else []
            try: quietly(learn, 'fit', 3, 5e-3, cbs=[RunState(folder, steps=1, minutes=None, best='valid_features'), *extra])
            except RuntimeError as e: assert 'stopped here' in str(e)
        results.append((None if stop else outcome(learn, folder), folder))
        learn.remove_cb(learn.spoil)
    return results[0][0], results[1][1]


def go_on(photos, folder, tmp_path, change=lambda state: None, monkeypatch=None):
    "The outcome of going on with a state in which something was changed"
    copy = tmp_path/'copy'
    shutil.copytree(folder, copy)
    read = runs._read_state
    def changed(file): s = read(file); change(s); return s
    if monkeypatch: monkeypatch.setattr(runs, '_read_state', changed)
    learn = rich(photos, n=2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quietly(learn, 'resume', copy, cbs=StopAt())
    return outcome(learn, copy)


def test_everything_together_goes_on_to_the_bit(photos, rich_run, tmp_path):
    whole,folder = rich_run
    s = runs._read_state(find_state(folder)[0])
    assert s['gradients'] and s['callbacks']['GradientAccumulation']['count'] == 8 and s['ranks'][0]['bad'][0] and s['place']['first'] == 1
    rest = go_on(photos, folder, tmp_path)
    for k,v in whole.items(): assert same({k: v}, rest), f'{k}: {v} {rest[k]}'


def leave(*path, default=None):
    "A change of a state: this one item is as in a run that starts"
    def f(s):
        for k in path[:-1]: s = s[k]
        if default is None: s.pop(path[-1])
        else: s[path[-1]] = default(s[path[-1]]) if callable(default) else default
    return f


changes = {
    'student': lambda s, m: s['model'].update({k: v for k,v in m.items() if k.startswith(('encoder', 'decoders'))}),
    'teacher': lambda s, m: s['model'].update({k: v for k,v in m.items() if k.startswith('teacher')}),
    'mean feature': lambda s, m: s['model'].update({k: v for k,v in m.items() if k.startswith('feature_mean')}),
    'count of the mean feature': lambda s, m: s['model'].update({k: v for k,v in m.items() if k.startswith('feature_count')}),
    'optimiser': leave('optimizer', default={}),
    'steps of the optimiser': lambda s, m: [o.update(step=torch.tensor(0.)) for o in s['optimizer'].values()],
    'first moments': lambda s, m: [o.update(exp_avg=o['exp_avg']*0) for o in s['optimizer'].values()],
    'second moments': lambda s, m: [o.update(exp_avg_sq=o['exp_avg_sq']*0) for o in s['optimizer'].values()],
    'hyperparameters': lambda s, m: [o.update(wd=.05) for o in s['hypers']],
    'gradients': leave('gradients', default={}),
    'accumulated images': leave('callbacks', 'GradientAccumulation'),
    'skipped batches': leave('callbacks', 'FiniteGuard'),
    'looks of the alarm': leave('callbacks', 'CollapseAlarm'),
    'loss scale': leave('callbacks', 'CPUScaler'),
    'state of a user\'s callback': leave('callbacks', 'Counts'),
    'epoch and batch': lambda s, m: s['place'].update(batch=0),
    'batch': lambda s, m: s['place'].update(batch=s['place']['batch'] - 1),
    'step': lambda s, m: s['place'].update(train_iter=0),
    'epoch of the data': lambda s, m: s['place'].update(first=0),
    'bad files': lambda s, m: s['ranks'][0].update(bad=[]),
    'generator of Python': leave('ranks', 0, 'generators', 'python'),
    'generator of numpy': leave('ranks', 0, 'generators', 'numpy'),
    'generator of torch': leave('ranks', 0, 'generators', 'torch'),
    'smoothed loss': lambda s, m: s['ranks'][0]['metrics'][0].update(val=torch.tensor(0.), count=0),
    'figures of the epoch': lambda s, m: s['ranks'][0].update(metrics=s['ranks'][0]['metrics'][:1]),
    'rows of the log': lambda s, m: s['recorder'].update(values=[]),
    'curve of losses': lambda s, m: s['recorder'].update(losses=None),
    'curve of learning rates': lambda s, m: s['recorder'].update(lrs=torch.zeros(0)),
    'ends of epochs': lambda s, m: s['recorder'].update(iters=[]),
    'best so far': leave('top', default=lambda top: top | dict(value=-1.))}


@pytest.mark.parametrize('item', changes)
def test_without_any_one_item_the_run_is_another(item, photos, rich_run, tmp_path, monkeypatch):
    whole,folder = rich_run
    change = changes[item]
    fresh = {k: v.clone() for k,v in rich(photos).model.state_dict().items()}
    try: rest = go_on(photos, folder, tmp_path, (lambda s: change(s)) if change.__code__.co_argcount == 1 else lambda s: change(s, fresh), monkeypatch)
    except (KeyError, IndexError, TypeError): return                   # it does not even begin
    assert not same(whole, rest), f'{item} is not needed'


def test_no_part_of_a_state_is_without_its_test(rich_run):
    s = runs._read_state(find_state(rich_run[1])[0])
    assert set(s) == {'model', 'optimizer', 'hypers', 'gradients', 'recorder', 'callbacks', 'config', 'ranks', 'place', 'top'}, 'a new part needs a line in `changes`'
    assert set(s['place']) == {'epoch', 'batch', 'n_epoch', 'n_iter', 'pct_train', 'train_iter', 'first'} and set(s['ranks'][0]) == {'generators', 'metrics', 'bad'}
    assert {k.split('.')[0] for k in s['model']} == {'encoder', 'decoders', 'teacher', 'feature_mean', 'feature_count'}
    assert {k for o in s['optimizer'].values() for k in o} == {'step', 'exp_avg', 'exp_avg_sq'}


def test_the_share_of_the_run_is_needed_under_a_schedule(tmp_path, monkeypatch):
    "`pct_train` and the curves of the schedule take part only where there is one"
    for stop in (False, True):
        learn = learner(cbs=[Journal()])
        try: quietly(learn, 'fit_one_cycle', 3, 1e-2, cbs=[RunState(tmp_path/str(stop), steps=1), *([StopAt(1, 1)] if stop else [])])
        except RuntimeError: pass
        if not stop: whole = learn
    read,lrs = runs._read_state, [o['lr'] for o in whole.journal.lines]
    for path,value in ((('place', 'pct_train'), 0.), (('callbacks', 'ParamScheduler', 'hps'), dict(lr=torch.zeros(0), mom=torch.zeros(0))), ((), None)):
        def changed(file, path=path, value=value):
            s = read(file)
            if path: leave(*path, default=lambda _: value)(s)
            return s
        shutil.rmtree(tmp_path/'copy', ignore_errors=True); shutil.copytree(tmp_path/'True', tmp_path/'copy')
        monkeypatch.setattr(runs, '_read_state', changed)
        rest = learner(cbs=[Journal()])
        quietly(rest, 'resume', tmp_path/'copy', cbs=StopAt())
        hps = {k: [float(o) for o in v] for k,v in whole.recorder.hps.items()}
        agrees = [o['lr'] for o in rest.journal.lines] == lrs[-len(rest.journal.lines):] and rest.recorder.hps == hps
        assert agrees == (path == ()), path


@pytest.mark.cuda
def test_generators_of_the_device_are_kept():
    torch.cuda.manual_seed(0); before = runs._generators(); a = torch.rand(3, device='cuda'); runs._set_generators(before)
    assert torch.equal(a, torch.rand(3, device='cuda'))


# ---- dBOT's stages

def test_another_first_teacher_is_gone_on_with_in_the_second_stage(tmp_path):
    "Its feature head is a new one there, of another width than the learner was made with"
    teacher = make_encoder('vit_tiny_patch16_224', 32, patch_size=8, width=48, depth=1, heads=3)
    def made(*cbs): return learner('dbot', cbs=[Journal(), *cbs], teacher=teacher)
    ends = []
    for stop in (None, (1, 2)):
        learn = made(*([StopAt(*stop)] if stop else []))
        folder = tmp_path/str(bool(stop))
        try: quietly(learn, 'fit_stages', 1, stages=2, lr=1e-2, folder=False, cbs=RunState(folder, steps=1))
        except RuntimeError: pass
        ends.append(learn)
    rest = made(); quietly(rest, 'resume', folder)
    assert equal(state(rest.model), state(ends[0].model)) and rest.journal.lines == ends[0].journal.lines[-len(rest.journal.lines):]
    assert rest.model.method.teacher == 'frozen' and rest.loss_func.method is rest.model.method
    best = load_model(folder/'best.safetensors')
    assert json.loads((folder/'best.json').read_text())['best']['stage'] == 1 and best.method.teacher == 'frozen'


# ---- what is refused, and what is not

def stopped(folder, **kw):
    learn = learner(cbs=[StopAt(1, 1)], **kw)
    try: quietly(learn, 'fit_one_cycle', 3, 1e-2, cbs=RunState(folder, steps=1))
    except RuntimeError: pass
    return learn


@pytest.mark.parametrize('kw,says', [(dict(seed=2), 'seed: 1 -> 2'), (dict(images='folder'), 'images.0.digest'),
    (dict(cbs=[GradientAccumulation(16)]), 'GradientAccumulation.n_acc: absent -> 16'),
                                     (dict(ema=.5), 'MomentumTeacher.decay_arg: None -> 0.5'),
    (dict(lr=.1), 'lr: 0.001 -> 0.1'), (dict(moms=(.8, .8, .8)), 'moms'), (dict(mask=make_mask('random')), 'mask: '),
    (dict(width=48, pixel_width=48), 'model.width: 32 -> 48'), (dict(precision='bf16'), 'CPUBFloat16'),
                                     (dict(wd=.1), 'wd: 0.05 -> 0.1'), (dict(mask='random'), "method.mask: 'block' -> 'random'")], ids=str)
def test_other_settings_are_named_and_refused(kw, says, tmp_path, photos):
    stopped(tmp_path)
    learn = learner(**kw | (dict(images=photos) if 'images' in kw else {}))
    before = state(learn.model)
    with pytest.raises(ResumeError, match='was started with other settings') as e: quietly(learn, 'resume', tmp_path, cbs=StopAt())
    assert says in str(e.value) and '\n' not in str(e.value) and 'allow_changes' in str(e.value)
    assert equal(state(learn.model), before), 'nothing was loaded'
    quietly(learn, 'fit', 1)                                            # and the learner is as good as new


def test_other_settings_are_taken_if_told_to(tmp_path, photos):
    stopped(tmp_path)
    learn = learner(images=photos, seed=3, cbs=[Journal()])
    quietly(learn, 'resume', tmp_path, allow_changes=True, cbs=StopAt(), n_epoch=4)
    assert [o['epoch'] for o in learn.journal.lines][-1] == 3 and find_state(tmp_path)[1]['finished']
    stopped(tmp_path/'b')
    with pytest.raises(ResumeError, match='do not fit this model'): quietly(learner(width=48, pixel_width=48), 'resume', tmp_path/'b', allow_changes=True, cbs=StopAt())
    with pytest.raises(ResumeError, match='give more epochs'): quietly(learner(), 'resume', tmp_path, allow_changes=True, cbs=StopAt(), n_epoch=1)


def test_moved_folders_and_other_workers_change_nothing(tmp_path, photos):
    stopped(tmp_path/'run', images=photos)
    shutil.copytree(photos, tmp_path/'elsewhere')
    shutil.move(tmp_path/'run', tmp_path/'moved')
    learn = learner(images=tmp_path/'elsewhere', workers=2)
    quietly(learn, 'resume', tmp_path/'moved', cbs=StopAt())
    assert find_state(tmp_path/'moved')[1]['finished']


def test_every_verb_begins_where_the_run_was(tmp_path):
    for i,fit in enumerate((lambda learn, **kw: learn.fit_flat_cos(2, 1e-2, **kw), lambda learn, **kw: learn.fit(2, slice(1e-3, 1e-2), **kw),
                            lambda learn, **kw: learn.fit_one_cycle(3, 1e-2, start_epoch=1, **kw))):
        whole,part,rest = learner(cbs=[Journal()]), learner(cbs=[StopAt(1, 1)]), learner(cbs=[Journal()])
        with whole.no_bar(), whole.no_logging(), part.no_bar(), part.no_logging():
            fit(whole)
            with pytest.raises(RuntimeError): fit(part, cbs=RunState(tmp_path/str(i), steps=2 if i < 2 else 100, epochs=None))
        quietly(rest, 'resume', tmp_path/str(i))
        assert rest.journal.lines == whole.journal.lines[-len(rest.journal.lines):] and len(rest.journal.lines) == (4 if i < 2 else 10)


def test_a_search_or_a_table_of_files_too(tmp_path, photos):
    "Loaders of fastai from a table: bad batches are named, other rows are another run"
    import pandas as pd
    from fastai.vision.augment import Resize
    from fastai.vision.data import ImageDataLoaders
    def made(df, *cbs):
        dls = ImageDataLoaders.from_df(df, photos, item_tfms=Resize(32), bs=4, seed=1, num_workers=0, device='cpu')
        return mim_learner(dls, cbs=[Journal(), *cbs], **tiny | small['bootmae'])
    df = pd.DataFrame(dict(name=[f'{p.name}.png' for p in sample_photos()], label=0))
    learn = made(df, Poison(), StopAt(1, 0))
    with pytest.warns(UserWarning, match=r'\.png'), pytest.raises(RuntimeError): quietly(learn, 'fit_one_cycle', 2, 1e-3, cbs=RunState(tmp_path, steps=1))
    with pytest.raises(ResumeError, match='images.0.digest'): quietly(made(df[::-1].reset_index(drop=True)), 'resume', tmp_path)
    whole,rest = made(df, Poison()), made(df, Poison())
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); quietly(whole, 'fit_one_cycle', 2, 1e-3); quietly(rest, 'resume', tmp_path)
    assert equal(state(whole.model), state(rest.model))


def test_another_folder_two_callbacks_and_fine_tune_are_refused(tmp_path):
    stopped(tmp_path/'a')
    with pytest.raises(ResumeError, match='writes to .*b, and the run to go on with is in .*a'): learner(cbs=[RunState(tmp_path/'b')]).resume(tmp_path/'a', cbs=StopAt())
    with pytest.raises(ResumeError, match='two RunState callbacks'): quietly(learner(cbs=[RunState(tmp_path/'b')]), 'fit', 1, cbs=RunState(tmp_path/'b'))
    with pytest.raises(ResumeError, match='fine_tune is two fits'): quietly(learner(), 'fine_tune', 1, cbs=RunState(tmp_path/'b'))
    assert not [*(tmp_path/'b').rglob('*.json')]


def test_a_signal_in_the_last_validation_is_not_swallowed(tmp_path):
    class Tell(Callback):
        def after_validate(self):
            if self.epoch == 1: os.kill(os.getpid(), signal.SIGTERM)
    learn = learner()
    with pytest.raises(SystemExit) as e: quietly(learn, 'fit_one_cycle', 2, 1e-2, cbs=[Tell(), RunState(tmp_path)])
    assert e.value.code == 143 and find_state(tmp_path)[1]['finished']


def test_a_run_that_stopped_early_is_finished_and_its_best_model_kept(tmp_path):
    from fastai.callback.tracker import EarlyStoppingCallback
    learn = learner(); quietly(learn, 'fit', 4, 1e-5, cbs=[EarlyStoppingCallback(min_delta=100), RunState(tmp_path)])
    rows,info = [[*o] for o in learn.recorder.values], find_state(tmp_path)[1]
    assert len(rows) == 2 and info['finished'] and (info['epoch'], info['batch']) == (2, 0)
    assert json.loads((tmp_path/'best.json').read_text())['best']['value'] == pytest.approx(min(o[1] for o in rows))
    again = learner(); quietly(again, 'resume', tmp_path, cbs=EarlyStoppingCallback(min_delta=100))
    assert [[*o] for o in again.recorder.values] == rows and equal(state(again.model), state(learn.model))


def test_the_best_of_two_fits_in_one_folder(tmp_path):
    learn = learner()
    quietly(learn, 'fit_one_cycle', 2, 1e-2, cbs=RunState(tmp_path)); first = json.loads((tmp_path/'best.json').read_text())['best']
    quietly(learn, 'fit', 1, .5, cbs=RunState(tmp_path))
    assert learn.recorder.values[-1][1] > first['value'] and json.loads((tmp_path/'best.json').read_text())['best'] == first


@pytest.mark.parametrize('text', ['[]', '{"format": "bootmae_nb run 1"}', '{"finished": false}', ''])
def test_a_damaged_description_gives_way_too(text, tmp_path):
    stopped(tmp_path)
    newest = sorted((tmp_path/'state').glob('*.json'))[-1]; newest.write_text(text)
    with pytest.warns(UserWarning, match='The state before it is taken'): assert find_state(tmp_path)[0].stem < newest.stem
    with pytest.raises(ResumeError, match='holds a run that stopped'): quietly(learner(), 'fit', 1, cbs=RunState(tmp_path))


def test_a_damaged_state_gives_way_to_the_one_before(tmp_path):
    stopped(tmp_path)
    newest = find_state(tmp_path)[0]
    data = bytearray(newest.read_bytes()); data[len(data)//2] ^= 1; newest.write_bytes(data)
    with pytest.warns(UserWarning, match='is damaged: its SHA-256'): file,info = find_state(tmp_path)
    assert file != newest and info['batch'] == 1
    for o in (tmp_path/'state').glob('*.json'): o.write_text('{')
    with pytest.warns(UserWarning), pytest.raises(ResumeError, match='holds no state of a run'): learner().resume(tmp_path)
    with pytest.raises(ResumeError, match='holds no state'): learner().resume(tmp_path/'nowhere')


def test_an_unfinished_run_is_not_written_over_and_a_finished_one_may_be(tmp_path):
    stopped(tmp_path)
    learn = learner()
    with pytest.raises(ResumeError, match='holds a run that stopped in epoch 2 of 3'): quietly(learn, 'fit_one_cycle', 1, cbs=RunState(tmp_path))
    quietly(learn, 'fit_one_cycle', 1, cbs=RunState(tmp_path, overwrite=True))
    assert find_state(tmp_path)[1]['finished'] and find_state(tmp_path)[1]['n_epoch'] == 1
    quietly(learn, 'fit_one_cycle', 2, cbs=RunState(tmp_path))
    before = state(learn.model)
    again = learner(); quietly(again, 'resume', tmp_path)               # nothing is left to do
    assert equal(state(again.model), before) and find_state(tmp_path)[1]['n_epoch'] == 2


def test_a_disk_that_is_full_does_not_end_the_run(tmp_path, monkeypatch):
    learn,write = learner(), runs.write_whole
    def full(path, f):
        if full.on and 'state' in str(path): raise OSError(28, 'No space left on device', str(path))
        return write(path, f)
    full.on = True
    monkeypatch.setattr(runs, 'write_whole', full)
    with pytest.raises((OSError, checkpoints.CheckpointError), match='No space left'): quietly(learn, 'fit_one_cycle', 1, cbs=RunState(tmp_path))
    full.on = False
    class Fills(Callback):
        def before_train(self): full.on = True
        def after_train(self): full.on = self.epoch == 1
    with pytest.warns(UserWarning, match='could not be saved .*No space left.* The run goes on; the last whole state is .*0000'):
        quietly(learn, 'fit_one_cycle', 3, cbs=[Fills(), RunState(tmp_path, steps=3)])
    assert find_state(tmp_path)[1]['finished']


def test_a_folder_that_cannot_be_written_to_is_told_before_training(tmp_path):
    (tmp_path/'file').write_text('x')
    learn = learner(cbs=[Journal()])
    with pytest.raises((OSError, checkpoints.CheckpointError), match='file'): quietly(learn, 'fit_one_cycle', 1, cbs=RunState(tmp_path/'file'))
    assert not learn.journal.lines


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    class Break(Callback):
        order = 60
        def after_step(self):
            if self.epoch == 1: self.model.encoder.vit.norm.weight.data[0] = float('nan')
    learn = learner(cbs=[Break()])
    try:
        with pytest.warns(UserWarning, match='not finite'): quietly(learn, 'fit_one_cycle', 2, cbs=RunState(tmp_path, steps=2))
    except ValueError: pass                                             # the guard stops the run
    for f in tmp_path.rglob('*.safetensors'):
        from safetensors.torch import load_file
        assert all(t.isfinite().all() for t in load_file(f).values() if t.is_floating_point()), f


def test_arguments_that_make_no_sense():
    for kw in (dict(steps=0), dict(minutes=-1), dict(keep=0)):
        with pytest.raises(ValueError, match='is not above 0'): RunState('x', **kw)


def test_looking_is_no_run(tmp_path):
    learn = learner(cbs=[RunState(tmp_path)])
    quietly(learn, 'validate'); quietly(learn, 'get_preds'); quietly(learn, 'lr_find', num_it=3, show_plot=False, suggest_funcs=())
    assert not [*tmp_path.rglob('*.safetensors')]
    quietly(learn, 'fit', 1)
    assert find_state(tmp_path)[1]['finished']


def test_old_states_go_and_the_best_model_stays(tmp_path):
    learn = learner(); quietly(learn, 'fit_one_cycle', 3, 1e-2, cbs=RunState(tmp_path, steps=1, keep=3))
    assert len([*(tmp_path/'state').glob('*.safetensors')]) == 3 == len([*(tmp_path/'state').glob('*.json')])
    info = json.loads((tmp_path/'best.json').read_text())
    valid = [o[1] for o in learn.recorder.values]
    assert info['best']['value'] == pytest.approx(min(valid)) and info['best']['epoch'] == 1 + valid.index(min(valid))
    assert load_model(tmp_path/'best.safetensors').method.name == 'bootmae'


def test_what_takes_long_is_done_once(tmp_path, monkeypatch):
    "The digest of a state, also by the command; a look at all files, not at each state"
    calls = []
    def counted(f): return lambda o: (calls.append(f.__name__), f(o))[1]
    for f in (runs.file_digest, runs.environment): monkeypatch.setattr(runs, f.__name__, counted(f))
    stopped(tmp_path)
    assert calls.count('environment') == 1 < calls.count('file_digest')
    calls.clear()
    learn = learner(lr=.1)
    with learn.no_bar(), learn.no_logging(), pytest.raises(ResumeError, match='other settings'): cli._resume(learn, 'fit_one_cycle', {}, tmp_path, False)
    assert calls == ['file_digest', 'environment']
    with pytest.raises(ResumeError, match='trains with fit_one_cycle, not with fit_paper'): cli._resume(learn, 'fit_paper', {}, tmp_path, False)
    with pytest.raises(ResumeError, match='holds no state of a run'): cli._resume(learn, 'fit_paper', {}, tmp_path/'nowhere', False)
