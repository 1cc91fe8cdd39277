"""Several processes train one model: as one process would, with equal copies, each image once, each file once, and together to the end."""
import os
import signal
import socket
import subprocess
import sys
import time
import traceback

import multiprocessing as mp
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.optimizer import SGD

from common import equal, quietly, state
from test_learner import MaskFromImage, Numbered, photos_learner, tiny
from bootmae_nb import cli, runs
from bootmae_nb.data import SeededDL
from bootmae_nb.distributed import MimDistributed, any_process, from_each, from_rank0, launch, launched, local_device
from bootmae_nb.learner import mim_learner
from bootmae_nb.models import ablations, mim_model
from bootmae_nb.masking import RandomMask
from bootmae_nb.losses import mim_loss
from bootmae_nb.recipes import recipe
from bootmae_nb.runs import find_state
from bootmae_nb.vit import make_encoder

small = dict(bootmae={}, mae=dict(pixel_depth=1, pixel_heads=3), dbot=dict(feature_width=32, feature_depth=1, feature_heads=2))


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def _child(rank, n, port, f, file):
    numbers = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=n, LOCAL_WORLD_SIZE=n, MASTER_PORT=port, OMP_NUM_THREADS=1)
    os.environ |= {k: str(v) for k,v in numbers.items()} | dict(MASTER_ADDR='127.0.0.1')
    torch.set_num_threads(1); torch.cuda.is_available = lambda: False
    try: res = f(rank)
    except BaseException: res = traceback.format_exc()
    torch.save(res, file)
    os._exit(0)                                             # no clean-up of what belongs to the tests' process


def together(f, tmp_path, n=2, limit=120):
    "What `f(rank)` returns in each of `n` processes that know of each other; fails after `limit` seconds"
    port,files = free_port(), [tmp_path/f'result_{r}.pt' for r in range(n)]
    for o in files: o.unlink(missing_ok=True)
    procs = [mp.get_context('fork').Process(target=_child, args=(r, n, port, f, files[r])) for r in range(n)]
    for p in procs: p.start()
    end = time.monotonic() + limit
    for p in procs: p.join(max(end - time.monotonic(), 0))
    hung = [p for p in procs if p.is_alive()]
    for p in hung: p.kill()
    assert not hung, f'{len(hung)} of {n} processes did not end in {limit} s'
    res = [torch.load(o, weights_only=False) for o in files]
    for o in res: assert not (isinstance(o, str) and 'Traceback' in o), o
    return res


def numbered_learner(bs, method='bootmae', opt_func=None, cbs=None, n_valid=32, **kw):
    "A learner whose images and masks are the same in any batch"
    train,valid = (SeededDL([Numbered()[i] for i in range(k)], bs=bs, num_workers=0, shuffle=s, device='cpu') for k,s in ((32, True), (n_valid, False)))
    args = tiny | dict(seed=0, ema=.9, mask='random', weight_of_features=1.) | small[method] | kw
    learn = mim_learner(DataLoaders(train, valid), method=method, cbs=cbs, **args)
    if opt_func: learn.opt_func = opt_func
    for dl in learn.dls.loaders: dl.after_batch.fs[-1] = MaskFromImage()
    return learn


def shared(learn, verb, *args, **kw):
    with learn.distrib_ctx(): return quietly(learn, verb, *args, **kw)


def close(a, b, eps=1e-5): return max((v - b[k]).abs().max().item() for k,v in a.items()) < eps and a.keys() == b.keys()


# one model

@pytest.mark.parametrize('opt_func', [None, SGD], ids=['adamw', 'sgd'])
@pytest.mark.parametrize('method', ['bootmae', 'mae', 'dbot'])
def test_two_processes_with_half_the_batch_each_are_one_with_the_whole(method, opt_func, tmp_path):
    make = lambda bs: numbered_learner(bs, method, opt_func, drop_path=0.)
    lr = .1 if opt_func else 1e-4
    def train(rank):
        learn = make(8)
        shared(learn, 'fit', 5, lr)
        return state(learn.model), learn.train_iter
    one = make(16); start = state(one.model)
    quietly(one, 'fit', 5, lr)
    (a,steps),(b,_) = together(train, tmp_path)
    assert steps == 10 and equal(a, b), 'the copies are equal to the bit, teacher and buffers included'
    assert close(a, state(one.model)) and not close(a, start, 1e-3)
    if method != 'mae': assert any(k.startswith('teacher.') for k in a) and a['feature_count'].max() == 10


def test_accumulating_in_two_processes_is_one_large_batch(tmp_path):
    "8 images of each of two processes, in two batches of 4"
    def train(rank):
        learn = numbered_learner(4, opt_func=SGD, cbs=GradientAccumulation(8))
        shared(learn, 'fit', 3, .1)
        return state(learn.model)
    one = numbered_learner(16, opt_func=SGD)
    quietly(one, 'fit', 3, .1)
    a,b = together(train, tmp_path)
    weights = lambda s: {k: v for k,v in s.items() if not k.startswith('feature_')}              # running means are of batches
    assert equal(a, b) and close(weights(a), weights(state(one.model)))


def test_bf16_keeps_the_copies_equal_and_near_to_one_process(tmp_path):
    def train(rank):
        learn = numbered_learner(8, precision='bf16', opt_func=SGD)
        shared(learn, 'fit', 2, .1)
        return state(learn.model), torch.is_autocast_enabled('cpu')
    one = numbered_learner(16, precision='bf16', opt_func=SGD)
    quietly(one, 'fit', 2, .1)
    (a,on),(b,_) = together(train, tmp_path)
    assert equal(a, b) and not on and close(a, state(one.model), 5e-3)


def test_every_weight_of_every_ablation_takes_part_in_a_step():
    "Or DDP would have to search for those that do not"
    x = torch.randn(4, 3, 32, 32)
    for name,kw in [(o, {}) for o in small] + [('bootmae', ablations[o]) for o in ablations]:
        model = mim_model(name, img_size=32, seed=0, **tiny | dict(depth=12) | small[name] | kw)
        mim_loss(model, x, RandomMask()(4, model.grid))[0].backward()
        unused = [n for n,p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not unused, (name, kw, unused)


# each its own

class Note(Callback):
    "Images, masks and losses of training, and how images were shared out"
    order = 90
    def before_fit(self): self.images,self.masks,self.losses,self.paths = [], [], [], []
    def before_batch(self):
        if self.training: self.paths.append(torch.get_rng_state().clone())
    def after_batch(self):
        if not self.training: return
        self.images.append(self.xb[0].clone()); self.masks.append(self.y.clone()); self.losses.append(self.loss.item())


def test_masks_and_drop_path_differ_between_processes_and_runs_repeat(tmp_path):
    def train(rank):
        res = []
        for _ in range(2):
            learn = photos_learner(bs=4, crops=2, cbs=Note(), drop_path=.5)
            shared(learn, 'fit', 1, 1e-3)
            res.append((learn.note.masks, learn.note.paths, learn.note.losses, state(learn.model)))
        return res
    a,b = together(train, tmp_path)
    assert not any(torch.equal(p, q) for p,q in zip(a[0][0], b[0][0])) and not any(torch.equal(p, q) for p,q in zip(a[0][1], b[0][1]))
    assert a[0][2] == a[1][2] and equal(a[0][3], a[1][3]) and equal(a[1][3], b[1][3])


@pytest.mark.parametrize('n,size,bs', [(2, 32, 4), (2, 21, 4), (3, 20, 2)])
def test_shares_are_disjoint_and_complete(n, size, bs, tmp_path):
    def train(rank):
        data = [(torch.full((3, 32, 32), float(i)),) for i in range(size)]
        loader = lambda s: SeededDL(data, bs=bs, num_workers=0, shuffle=s)
        learn = mim_learner(DataLoaders(loader(True), loader(False)), **tiny, mean=(0.,)*3, std=(1.,)*3, cbs=Note())
        shared(learn, 'fit', 1, 0.)
        return [x[:, 0, 0, 0].round().int().tolist() for x in learn.note.images], learn.dls.train.shard
    res = together(train, tmp_path, n)
    every = [i for batches,_ in res for b in batches for i in b]
    assert set(every) == set(range(size)) and len(every) - size < n, 'each image once, but for those that fill up the last batch'
    assert len({tuple(map(len, batches)) for batches,_ in res}) == 1 and all(shard == (0, 1) for _,shard in res)


@pytest.mark.parametrize('n_valid', [32, 17, 9, 1])
def test_metrics_are_those_of_one_process(n_valid, tmp_path):
    "Also where images do not divide: 17 images in batches of 4 leave a batch of one image for one process and none for the other"
    def train(rank):
        learn = numbered_learner(4, n_valid=n_valid, opt_func=SGD)
        before = shared(learn, 'validate')
        learn.recorder.train_metrics = True
        shared(learn, 'fit', 2, .1)
        return [*before], [[*o] for o in learn.recorder.values], [float(o) for o in learn.recorder.losses], quietly(learn, 'validate')
    one = numbered_learner(8, n_valid=n_valid, opt_func=SGD)
    before = quietly(one, 'validate')
    one.recorder.train_metrics = True
    quietly(one, 'fit', 2, .1)
    a,b = together(train, tmp_path)
    assert a[:3] == b[:3] and a[3] == b[3], 'the same figures in both'
    comparable = [i for i,k in enumerate(one.recorder.metric_names[1:-1]) if 'target_var' not in k]      # a variance over the images of a batch
    assert len(comparable) == 6
    assert torch.tensor(a[0][:3]).allclose(torch.tensor([*before][:3]), atol=1e-5)
    for row,want in zip(a[1], one.recorder.values): assert all(abs(row[i] - want[i]) < 1e-5 for i in comparable)
    assert torch.tensor(a[2]).allclose(torch.tensor([float(o) for o in one.recorder.losses]), atol=1e-5)
    assert abs(a[3][0] - a[1][-1][4]) < 1e-5, 'outside the context each process validates on its own'


def test_target_variance_is_the_mean_over_batches_of_all_processes(tmp_path):
    def train(rank):
        learn = numbered_learner(4)
        return [*shared(learn, 'validate')][-1]
    a,b = together(train, tmp_path)
    alone = numbered_learner(4)
    order = [i for k in range(4) for r in range(2) for i in range(8*k + r, 8*k + 8, 2)]         # batches of 4 as the two read them
    alone.dls.valid.get_idxs = lambda: order
    assert a == b and abs(a - [*quietly(alone, 'validate')][-1]) < 1e-5


# once

def test_files_are_written_once_and_rows_printed_once(tmp_path, capfd):
    def train(rank):
        learn = photos_learner(bs=4, crops=1, path=tmp_path, log_pictures=tmp_path/'pictures')
        written = []
        import bootmae_nb.callbacks as c
        old = c.write_whole
        c.write_whole = lambda path, f: (written.append(path.name), old(path, f))[1]
        bars = hasattr(learn, 'progress')
        with learn.distrib_ctx():
            learn.fit(2, 1e-3); learn.save('m'); learn.load('m'); learn.export('e.pkl')
            inside = hasattr(learn, 'progress')
        return written, bars, inside, hasattr(learn, 'progress'), learn.logger is print, learn.n_processes
    a,b = together(train, tmp_path)
    assert a[0] == ['epoch_0001.png', 'epoch_0002.png'] and b[0] == []
    assert a[1:] == (True, True, True, True, 1) and b[1:] == (True, False, True, True, 1)
    assert capfd.readouterr().out.count('train_loss') == 1
    from fastai.learner import load_learner
    again = load_learner(tmp_path/'e.pkl')
    assert not again._grab_cbs(MimDistributed) and again.n_processes == 1
    assert equal(state(again.model), torch.load(tmp_path/'models'/'m.pth')['model'])


@pytest.mark.parametrize('kw', [{}, dict(teacher_depth=0), dict(teacher='wide')], ids=['frozen', 'no blocks', 'of another width'])
def test_stages_begin_alike_in_all_processes(kw, tmp_path):
    class Starts(Callback):
        order = 80
        def before_fit(self): self.starts = []
        def before_train(self): self.starts.append({k.removeprefix('module.'): v for k,v in state(self.model).items()})
    kw = kw | (dict(teacher=make_encoder('vit_tiny_patch16_224', 32, patch_size=8, width=96, depth=1, heads=3)) if kw.get('teacher') else {})
    make = lambda bs: photos_learner(method='dbot', bs=bs, crops=2, path=tmp_path, cbs=Starts(), **small['dbot'] | dict(pixel_width=64) | kw)
    def train(rank):
        learn = make(4)
        log = shared(learn, 'fit_stages', 1, stages=2, lr=1e-3)
        return learn.starts.starts, state(learn.model), [o['stage'] for o in log]
    a,b = together(train, tmp_path)
    assert all(equal(p, q) for p,q in zip(a[0], b[0])) and equal(a[1], b[1]) and (a[2], b[2]) == ([1, 2], [])
    one = make(8); quietly(one, 'fit_stages', 1, stages=2, lr=1e-3)
    student = lambda s: {k: v for k,v in s.items() if k.startswith(('encoder.', 'decoders.'))}
    assert equal(student(a[0][1]), student(one.starts.starts[1])) and not equal(student(a[1]), student(a[0][1])), 'and as in one process'
    assert sorted(p.name for p in (tmp_path/'stages').glob('*.safetensors')) == ['stage_1.safetensors', 'stage_2.safetensors']


def test_learning_rates_follow_the_images_of_all_processes(tmp_path):
    class Highest(Callback):
        order = 90
        def before_fit(self): self.lr = 0.
        def after_step(self): self.lr = max(self.lr, self.opt.hypers[-1]['lr'])
    def train(rank):
        res = []
        for method,verb,args,kw in (
            ('mae', 'fit_paper', (1,), dict(warmup=0.)), ('mae', 'fit_paper', (1,), dict(warmup=0., bs=256)), ('mae', 'fit_recipe', (recipe('mae_base_800'), 1), {}),
            ('dbot', 'fit_stages', (1,), dict(stages=1, lr=1e-3, schedule='paper', warmup=0.))):
            learn = photos_learner(method=method, bs=4, crops=8, path=tmp_path, cbs=Highest(), **small[method])
            shared(learn, verb, *args, **kw)
            res.append(learn.highest.lr)
        return res
    a,b = together(train, tmp_path)
    assert a == b
    paper = 1.5e-4*8/256
    assert abs(a[0] - paper) < 1e-9 and abs(a[1] - 1.5e-4) < 1e-9 and .9*paper < a[2] <= paper + 1e-9 and abs(a[3] - 1e-3) < 1e-9


# other verbs

def test_predictions_are_complete_and_in_order_inside_and_outside(tmp_path):
    def train(rank):
        learn = numbered_learner(4, n_valid=11)
        outside = quietly(learn, 'get_preds')
        with learn.distrib_ctx():
            quietly(learn, 'fit', 1, 0.)
            inside = quietly(learn, 'get_preds')
            pic = learn.show_results().size
        return outside[0][0], inside[0][0], pic, quietly(learn, 'get_preds')[0][0]
    a,b = together(train, tmp_path)
    want = quietly(numbered_learner(8, n_valid=11), 'get_preds')[0][0]
    assert all(o.shape == want.shape and o.allclose(want, atol=1e-5) for r in (a, b) for o in (r[0], r[1], r[3])) and a[2] == b[2]


def test_what_cannot_work_says_so(tmp_path):
    def attempt(f):
        try: f()
        except Exception as e: return f'{type(e).__name__}: {e}'
    def train(rank):
        learn,other = photos_learner(crops=1, path=tmp_path), photos_learner(crops=1, seed=1 + rank, path=tmp_path)
        return (attempt(lambda: quietly(learn, 'fit', 1)), attempt(lambda: shared(learn, 'lr_find')), attempt(lambda: shared(other, 'fit', 1)),
                attempt(lambda: from_rank0(lambda: 1/0)), attempt(lambda: shared(learn, 'fit', 1)))
    for res in together(train, tmp_path):
        assert 'fit within `with learn.distrib_ctx():`' in res[0]
        assert 'lr_find searches in one process' in res[1]
        assert 'the processes do not share one run' in res[2] and res[3] == 'ZeroDivisionError: division by zero' and res[4] is None


def test_processes_ask_and_tell(tmp_path):
    def ask(rank): return from_rank0(lambda: f'run_{os.getpid()}'), any_process(rank == 1, False), launched(), str(local_device('cpu')), from_each(rank)
    a,b = together(ask, tmp_path)
    assert a == b and a[1:] == ([True, False], True, 'cpu', [0, 1])


# trouble

def test_an_exception_leaves_a_learner_that_trains_again(tmp_path):
    class Fail(Callback):
        order = 95
        def __init__(self, where): self.where,self.on = where, True
        def after_loss(self):
            if self.on and self.where == ('train' if self.training else 'valid') and self.iter == 1: raise ZeroDivisionError('on purpose')
    def train(rank):
        ends = []
        for where in ('nowhere', 'train', 'valid'):
            learn = numbered_learner(4, cbs=Fail(where), n_valid=20)
            model = learn.model
            if where != 'nowhere':
                start = state(learn.model)
                try: shared(learn, 'fit', 1, 1e-3)
                except ZeroDivisionError: pass
                else: raise AssertionError('no exception')
                assert learn.model is model and all(dl.shard == (0, 1) for dl in learn.dls) and learn.logger is print and not learn._grab_cbs(MimDistributed)
                assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and hasattr(learn, 'progress') and learn.n_processes == 1
                model.load_state_dict(start); learn.opt = None; learn.fail.on = False; learn.dls.train.epoch = -1
            shared(learn, 'fit', 1, 1e-3)
            assert learn.model is model
            ends.append(state(model))
        return ends
    a,b = together(train, tmp_path)
    assert equal(a[0], a[1]) and equal(a[0], a[2]) and equal(a[0], b[2])


@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_one_process_stops_all_after_the_same_step(sig, tmp_path):
    class Send(Callback):
        order,sent = 20, False
        def after_loss(self):
            if self.training and self.train_iter == 2 and not self.sent and os.environ['RANK'] == '1': self.sent = True; os.kill(os.getpid(), sig)
    def train(rank):
        learn = numbered_learner(4, cbs=Send())
        with learn.distrib_ctx():
            try: quietly(learn, 'fit', 3, 1e-3)
            except KeyboardInterrupt: stopped = learn.train_iter
            os.kill(os.getpid(), sig)                       # the second of a pair
            time.sleep(.01)
            quietly(learn, 'fit', 1, 1e-3)
        return stopped, state(learn.model), signal.getsignal(sig) in (signal.SIG_DFL, signal.default_int_handler)
    a,b = together(train, tmp_path)
    assert a[0] == b[0] == 3 and equal(a[1], b[1]) and a[2] and b[2]


def journalled(*cbs):
    from test_resume import Journal, learner
    return learner(cbs=[Journal(), *cbs])


def test_a_run_of_two_goes_on_to_the_bit_after_one_of_them_was_told_to_stop(tmp_path):
    "In mid-epoch, with masks and drop path of each process its own; the state is written once, and refused by another number of processes"
    from bootmae_nb.runs import ResumeError, RunState, find_state
    class Tell(Callback):
        def before_step(self):
            if os.environ['RANK'] == '1' and (self.epoch, self.iter) == (1, 0): os.kill(os.getpid(), signal.SIGTERM)
    def whole(rank):
        learn = journalled(); shared(learn, 'fit_one_cycle', 3, 1e-2)
        return learn.journal.lines, state(learn.model)
    def part(rank):
        learn = journalled(Tell())
        try: shared(learn, 'fit_one_cycle', 3, 1e-2, cbs=RunState(tmp_path/'run', steps=1))
        except SystemExit as e: return e.code, learn.journal.lines, get_back(learn)
    def get_back(learn): return learn.model.__class__.__name__, learn.dls.train.shard
    def rest(rank):
        learn = journalled(); shared(learn, 'resume', tmp_path/'run')
        return learn.journal.lines, state(learn.model)
    a,b = together(whole, tmp_path)
    (code,lines,plain),(code2,lines2,_) = together(part, tmp_path)
    assert code == code2 == 143 and len(lines) == len(lines2) and plain == ('MaskedAutoencoder', (0, 1))
    info = find_state(tmp_path/'run')[1]
    assert (info['epoch'], info['batch'], info['settings']['processes']) == (1, 1, 2)
    with pytest.raises(ResumeError, match='processes: 2 -> 1'): quietly(journalled(), 'resume', tmp_path/'run')
    for (all_lines,weights),(more,now),begun in zip((a, b), together(rest, tmp_path), (lines, lines2)):
        assert begun + more == all_lines and equal(weights, now)
    assert equal(a[1], b[1]) and a[0] != b[0], 'equal copies, other images'
    assert find_state(tmp_path/'run')[1]['finished']


def test_alone_the_context_does_nothing():
    learn = numbered_learner(8)
    with learn.distrib_ctx() as same:
        assert same is learn and not learn._grab_cbs(MimDistributed) and not torch.distributed.is_initialized()
        quietly(learn, 'fit', 1, 1e-3)
    one = numbered_learner(8); quietly(one, 'fit', 1, 1e-3)
    assert equal(state(one.model), state(learn.model))


def test_the_accelerator_does_not_outlive_the_context(tmp_path):
    def train(rank):
        from accelerate.state import AcceleratorState, PartialState
        for _ in range(2): shared(numbered_learner(8), 'fit', 1, 1e-3)
        return PartialState._shared_state == {} and AcceleratorState._shared_state == {}
    assert together(train, tmp_path) == [True, True]


def test_one_process_of_one(tmp_path):
    def train(rank):
        learn = numbered_learner(16)
        shared(learn, 'fit', 2, 1e-3)
        return state(learn.model)
    one = numbered_learner(16); quietly(one, 'fit', 2, 1e-3)
    assert close(together(train, tmp_path, n=1)[0], state(one.model))


# the real launchers

script = '''
import json, os, sys, torch
torch.set_num_threads(1)
from bootmae_nb.data import mim_dls
from bootmae_nb.learner import mim_learner
rank = int(os.environ.get('RANK', 0))
dls = mim_dls(img_size=32, bs=4, crops_per_image=1, num_workers=0, seed=1, device=sys.argv[1])
learn = mim_learner(dls, 'vit_tiny_patch16_224', patch_size=8, width=48, depth=1, heads=3, pixel_width=48, path=sys.argv[2])
with learn.distrib_ctx(), learn.no_bar(), learn.no_logging():
    learn.fit(1, 1e-3)
    learn.save('model')
torch.save([dict(learn.model.state_dict()), learn.n_processes, str(next(learn.model.parameters()).device), [*learn.recorder.values[0]]], f'{sys.argv[2]}/rank_{rank}.pt')
if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()
'''


def run_script(start, tmp_path, device='cpu', n=2):
    "What each process of the script ended with"
    (tmp_path/'train.py').write_text(script)
    done = subprocess.run([*start, tmp_path/'train.py', device, tmp_path], capture_output=True, text=True, timeout=300, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(tmp_path/f'rank_{r}.pt', map_location='cpu') for r in range(n)]


launchers = dict(
    torchrun=[sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2'],
    accelerate=[sys.executable, '-m', 'accelerate.commands.launch',
                *'--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision bf16 --dynamo_backend no'.split()])


@pytest.mark.slow
@pytest.mark.parametrize('how', launchers)
def test_a_script_under_a_launcher(how, tmp_path):
    "`--mixed_precision` of accelerate is not ours: precision is that of the learner"
    (a,n,_,row),(b,_,_,other) = run_script(launchers[how], tmp_path)
    assert equal(a, b) and row[:-1] == other[:-1] and n == 1
    assert equal({k: v for k,v in torch.load(tmp_path/'models'/'model.pth')['model'].items()}, a)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others_and_tells(tmp_path):
    (tmp_path/'s.py').write_text("import os, sys, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\ntime.sleep(60)")
    start,call = time.monotonic(), f"import sys; from bootmae_nb.distributed import launch; sys.exit(launch(2, [sys.executable, {str(tmp_path/'s.py')!r}], 'cpu'))"
    done = subprocess.run([sys.executable, '-c', call], capture_output=True, text=True, timeout=100)
    assert done.returncode == 137 and 'process 1 of 2 was ended by SIGKILL, perhaps for want of memory' in done.stderr, done.stderr
    assert time.monotonic() - start < 50


def test_launch_gives_the_command_its_arguments_and_returns_its_status(capfd, monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    code = "import os, sys; print(os.environ['RANK'], os.environ['OMP_NUM_THREADS'], sys.argv[1:]); sys.exit(3*(os.environ['RANK'] == '1'))"
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert launch(2, [sys.executable, '-c', code, 'a b', '--x', "it's"], 'cpu') == 3
    out,err = capfd.readouterr()
    threads = max(1, len(os.sched_getaffinity(0))//2)
    assert f'''0 {threads} ['a b', '--x', "it's"]''' in out and err.strip() == 'process 1 of 2 ended with status 3, and the others were stopped'
    assert launch(2, ['true'], 'cpu') == 0 and 'OMP_NUM_THREADS' not in os.environ
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.slow
def test_a_console_command_starts_itself_again(tmp_path):
    (tmp_path/'command').write_text("""import sys
from fastcore.script import call_parse
from bootmae_nb.distributed import launch, launched

@call_parse
def main(source:str, nproc:int=1):
    if nproc > 1 and not launched(): sys.exit(launch(nproc, [sys.executable, *sys.argv], 'cpu'))
    print(f'images in {source}')
    sys.exit(2)

main()
""")
    done = subprocess.run([sys.executable, tmp_path/'command', "a b's", '--nproc', '2'], capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines() == ["images in a b's"]*2 and done.returncode == 2, done.stderr


@pytest.mark.parametrize('nproc,device,says', [(0, 'cpu', '0 processes cannot train'), (99, 'cuda', '99 processes need 99 GPUs'), (2, 'mps', 'CPUs or NVIDIA GPUs')])
def test_launch_refuses_what_cannot_work(nproc, device, says):
    with pytest.raises(ValueError, match=says): launch(nproc, ['true'], device)


@pytest.mark.cuda
def test_one_gpu_in_a_world_of_one(tmp_path):
    (_,_,device,row), = run_script([*launchers['torchrun'][:-1], '1'], tmp_path, 'cuda', 1)
    assert device == 'cuda:0' and row[0] > 0


@pytest.mark.cuda
def test_two_gpus_hold_equal_copies(tmp_path):
    if torch.cuda.device_count() < 2: pytest.skip('needs two GPUs: NCCL between processes IS NOT TESTED here')
    (a,_,first,row),(b,_,second,other) = run_script(launchers['torchrun'], tmp_path, 'cuda')
    assert (first, second) == ('cuda:0', 'cuda:1') and equal(a, b) and row[:-1] == other[:-1]


@pytest.mark.parametrize('how', [dict(method='mae', schedule='paper'), dict(recipe='mae_base_800'), dict(recipe='mae_base_800', schedule='paper'),
                                 dict(method='mae'), dict(recipe='dbot_base_1600')], ids=str)
def test_the_command_trains_with_the_learning_rate_that_was_given(how, tmp_path, monkeypatch):
    "Whatever the schedule and the number of processes, it is the highest one"
    monkeypatch.setenv('BOOTMAE_DEVICE', 'cpu')
    kind = 'feature' if 'dbot' in str(how) else 'pixel'
    own = dict(width=48, depth=1, heads=3) | {f'{kind}_width': 48, f'{kind}_heads': 3, f'{kind}_depth': 1}
    def train(rank, out='two'):
        cli.bootmae_train('photos', arch='vit_tiny_patch16_224', img_size='32', patch_size=8, bs=8, crops=8, epochs=1, lr=2e-3, set=[f'{k}={v}' for k,v in own.items()],
                          out=tmp_path/out, workers=0, **how)
    together(train, tmp_path); train(0, 'one')
    highest = [float(runs._read_state(find_state(tmp_path/o)[0])['recorder']['lrs'].max()) for o in ('one', 'two')]
    assert all(.7*2e-3 < o <= 2e-3*(1 + 1e-6) for o in highest), highest
