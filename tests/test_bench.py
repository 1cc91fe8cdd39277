"""The benchmark: the plain path equals the fast one, counts are those done by hand, sides take turns, and nothing measured is lost."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bootmae_nb import bench
from bootmae_nb.bench import (Clock, Contest, Entry, MatmulRate, Ours, Plain, Variant, Workload, bench_table, growth, growth_loads, is_installed, main, paired_ratio,
                              peak_memory, quick_load, run_bench, step_flops, step_memory, step_seconds, step_split, variants)
from bootmae_nb.losses import mim_losses, mim_targets
from bootmae_nb.models import mim_model
from bootmae_nb.yardstick import plain_loss, plain_predictions, plain_step, plain_optimiser, plain_targets

cpu = torch.device('cpu')
names = ('bootmae', 'mae', 'dbot')
tiny = dict(arch='vit_tiny_patch16_224', img_size=(32, 48), patch_size=8, width=48, depth=3, heads=4, seed=0)
sizes = dict(bootmae=dict(pixel_width=32, pixel_heads=4, pixel_inject=1), mae=dict(pixel_width=32, pixel_heads=4, pixel_depth=2),
             dbot=dict(feature_width=32, feature_heads=4, feature_depth=2, drop_path=0.))
needs = lambda o: pytest.mark.skipif(not is_installed(o), reason=f'needs {o}: extra bench')
peers = pytest.mark.parametrize('peer', [pytest.param(o, marks=needs(o)) for o in ('transformers', 'lightly')])


def apart(a, b): return ((a.double() - b.double()).norm()/b.double().norm()).item()


def trained(name, **kw):
    "A model a few steps away from its initialisation, so that biases and tokens are not zero, with a teacher of its own"
    model = mim_model(name, **tiny, **(sizes[name] | kw)).train()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p += .02*torch.randn(p.shape, generator=g)
    images = torch.randn(3, 3, 32, 48, generator=g)
    mask = model.method.masker(3, model.grid, g)
    return model, images, mask, int(mask[0].sum())


def gradients(model, loss):
    model.zero_grad(); loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])


@pytest.mark.parametrize('name', names)
def test_the_plain_path_equals_ours(name):
    model,images,mask,n = trained(name)
    targets,out = mim_targets(model, images, mask, n), model(images, mask, n)
    every,plain = plain_targets(model, images), plain_predictions(model, images, mask, n)
    for k in out:
        hidden = mask if plain[k].shape[1] == mask.shape[1] else torch.nn.functional.pad(mask, (1, 0), value=True)         # the class token
        assert apart(out[k].flatten(0, 1), plain[k][hidden]) < 1e-5 and apart(targets[k][0].flatten(0, 1), every[k][hidden]) < 1e-5, k
    ours,theirs = sum(mim_losses(model.method, out, targets).values()).mean(), plain_loss(model, images, mask, n)
    assert apart(ours, theirs) < 1e-5
    assert apart(gradients(model, ours), gradients(model, theirs)) < 1e-4


@pytest.mark.parametrize('kw', [dict(pixel_inject=None, feature_inject=None), dict(positions='all', loss='smooth_l1'), dict(norm_pixels=False, norm_features='token'),
                                dict(mask='random', weighted=False), dict(norm_features=False, feature_blocks=(1,)), dict(class_token=False)])
def test_the_plain_path_knows_ablations(kw):
    model,images,mask,n = trained('bootmae', **kw)
    ours = sum(mim_losses(model.method, model(images, mask, n), mim_targets(model, images, mask, n)).values()).mean()
    theirs = plain_loss(model, images, mask, n)
    assert apart(ours, theirs) < 1e-5 and apart(gradients(model, ours), gradients(model, theirs)) < 1e-4


def test_the_plain_path_refuses_what_it_does_not_know():
    model,images,mask,n = trained('bootmae', feature_blocks=(0, 1))
    with pytest.raises(ValueError, match='single block'): plain_loss(model, images, mask, n)


def test_a_plain_step_moves_model_and_teacher():
    model,images,mask,n = trained('bootmae')
    opt,was = plain_optimiser(model, 1e-3), {k: v.clone() for k,v in model.state_dict().items()}
    losses = [plain_step(model, opt, images, mask, n, .9).item() for _ in range(8)]
    assert losses[-1] < losses[0]
    for part in ('encoder.vit.blocks.0.attn.qkv.weight', 'teacher.vit.blocks.0.attn.qkv.weight', 'decoders.pixels.head.weight'):
        assert not torch.equal(model.state_dict()[part], was[part])


def test_operations_equal_a_count_by_hand():
    load = quick_load('mae', columns=dict(pixel_width=32, pixel_depth=1, pixel_heads=2))
    D,W,L,seen,P = 64, 32, 16, 5, 3*8*8                                        # widths, patches, visible tokens with the class token, values of a patch
    block = lambda d, n, queries: 2*d*d*(queries*1 + 2*n) + 2*2*queries*n*d + 2*queries*d*d + 2*2*queries*4*d*d        # q, k and v; two products; projection; MLP
    embed = 2*(seen - 1)*P*D
    decoder = 2*seen*D*W + block(W, L + 1, 12) + 2*12*W*P                     # its only block asks for the 12 hidden tokens alone
    forward = embed + 2*block(D, seen, seen) + decoder
    ours = Ours(load, 'fp32', cpu)
    assert step_flops(ours, 1) == 3*forward - embed                            # images need no gradient
    qkv = 2*W*W*(12 + 2*(L + 1))
    for batch in (4, 8): assert step_flops(ours, batch) == pytest.approx(3*(forward - qkv + 3*2*W*W*(seen + L/batch)) - embed)      # mask tokens once for a batch
    full = 2*L*P*D + 2*block(D, seen, seen) + 2*seen*D*W + block(W, L + 1, L + 1) + 2*(L + 1)*W*P
    assert step_flops(Plain(load, 'fp32', cpu), 2) == 3*full - 2*L*P*D


def test_peak_memory_of_known_cases():
    MiB = 2**20
    x,w = torch.randn(1024, 256), torch.randn(256, 256, requires_grad=True)
    def step(mark): (x @ w).exp().sum().backward(); mark(); w.grad = None
    assert abs(peak_memory(step, lambda: [w.grad], cpu) - 2*MiB) < 100
    def later(mark): (x @ w).sum().backward(); mark(); torch.empty(3*MiB, dtype=torch.uint8); w.grad = None
    assert abs(peak_memory(later, lambda: [w.grad], cpu) - 3*MiB) < 100
    assert abs(peak_memory(later, lambda: [], cpu) - 3.25*MiB) < 100, 'a gradient that is not named is counted'
    kept = []
    assert peak_memory(lambda mark: kept.append(torch.empty(MiB, dtype=torch.uint8)), lambda: [], cpu) == MiB
    def one_after_the_other(mark):
        for _ in range(5): torch.empty(MiB, dtype=torch.uint8)
    assert peak_memory(one_after_the_other, lambda: [], cpu) == MiB
    assert peak_memory(lambda mark: kept.clear(), lambda: [], cpu) == 0, 'what was there before is not counted'


def test_memory_of_a_step_grows_with_the_batch_and_leaves_the_state_out():
    load = quick_load(); side = Ours(load, 'fp32', cpu).prepare(); side.step(load.images())
    a,b = (step_memory(side, load.images(n)) for n in (4, 16))
    assert a == step_memory(side, load.images(4)) and 3 < b/a < 4.2
    plain = Plain(load, 'fp32', cpu).prepare(); plain.step(load.images())
    assert step_memory(plain, load.images(16)) > b


def test_the_matrix_product_rate_is_plausible():
    rate = MatmulRate('fp32', cpu, [(256, 256, 256), (64, 128, 256)])
    for _ in range(3): rate.time()
    assert list(rate.rates()) == ['256 x 256 x 256', '64 x 128 x 256'] and all(1e9 < o < 1e13 for o in rate.rates().values())


def test_parts_add_up_to_the_step():
    load = quick_load(batch=8); side = Ours(load, 'fp32', cpu).prepare(); batch = load.images()
    for _ in range(3): side.step(batch)
    splits,walls = [], []
    for _ in range(5):
        start = time.perf_counter(); splits.append(step_split(side, batch)); walls.append(time.perf_counter() - start)
    assert set(splits[0]) == {'other', 'data', 'mask', 'targets', 'teacher', 'forward', 'backward', 'optimiser', 'ema'}
    for split,wall in zip(splits, walls): assert .9*wall - 1e-3 < sum(split.values()) <= wall and split['teacher'] > 0 and split['other'] < .2*wall + 1e-3
    assert 'teacher_features' not in vars(side.model), 'what timed the teacher is gone'
    plain = Plain(load, 'fp32', cpu).prepare(); plain.step(batch)
    assert step_split(plain, batch)['teacher'] > 0


def test_the_clock_takes_inner_parts_out():
    clock = Clock(cpu)
    with clock('a'):
        for _ in range(2):
            with clock('b'): time.sleep(.01)
    read = clock.read()
    assert .02 <= read['b'] < .2 and read['a'] < .01


@peers
def test_peers_do_the_same_work(peer):
    load = quick_load('mae'); side,ours = variants[peer].side(load, 'fp32', cpu), Ours(load, 'fp32', cpu)
    extra = load.width if peer == 'lightly' else 0                            # a mask token of its encoder, which MAE does not use
    assert sum(p.numel() for p in side.model.parameters() if p.requires_grad) == sum(p.numel() for p in ours.model.parameters() if p.requires_grad) + extra
    flops = step_flops(side, 2)
    assert step_flops(ours, 2) < flops <= step_flops(Plain(load, 'fp32', cpu), 2)
    side.prepare(); losses = [side.step(load.images()).item() for _ in range(5)]
    assert all(math.isfinite(o) and .5 < o < 3 for o in losses) and step_seconds(side, [load.images()], 2) > 0
    side = variants[peer].side(load, 'bf16', cpu).prepare()
    assert math.isfinite(side.step(load.images()).item()) and set(step_split(side, load.images())) >= {'forward', 'backward', 'optimiser'}


@peers
def test_peers_can_have_our_optimiser_and_memory(peer):
    load = quick_load('mae'); plain,tuned = (variants[o].side(load, 'fp32', cpu).prepare() for o in (peer, f'{peer}_tuned'))
    assert not plain.opt.defaults['fused'] and tuned.opt.defaults['fused'] and math.isfinite(tuned.step(load.images()).item())
    assert variants[peer].around is nullcontext and variants[f'{peer}_tuned'].around is variants['ours'].around


@peers
def test_peers_have_the_papers_sizes(peer):
    load = Workload('mae')
    with torch.device('meta'): ours = sum(p.numel() for p in mim_model('mae').parameters() if p.requires_grad)
    side = object.__new__(variants[peer].side); side.load = load
    with torch.device('meta'): n = sum(p.numel() for p in side.make().parameters() if p.requires_grad)
    assert n == ours + (768 if peer == 'lightly' else 0)


def test_sides_take_turns_and_the_file_has_it_all(tmp_path):
    file = tmp_path/'new'/'b.json'
    res = run_bench([quick_load('mae'), quick_load('dbot')], ['plain', 'ours'], rounds=3, least=.001, out=file, quiet=True)
    assert json.loads(file.read_text()) == json.loads(json.dumps(res)) and res['status'] == 'complete' and res['format'] == 1
    assert {'device', 'cores', 'threads', 'instructions', 'native_bf16', 'versions'} <= res['machine'].keys()
    for g in res['groups']:
        assert g['order'] == ['plain/fp32', 'ours/fp32']*3 and Workload(**g['workload']).batch == 4
        ours = g['entries']['ours/fp32']
        assert len(ours['seconds']) == 3 and len(ours['splits']) == 3 and ours['status'] == 'ok' and 0 < ours['matmul_share'] < 1.5
        assert ours['images_per_second'] == pytest.approx(4/sorted(ours['seconds'])[1]) and ours['spread'][0] <= ours['images_per_second'] <= ours['spread'][1]
        assert {'peak', 'resident', 'parameters', 'fixed', 'gradients', 'optimiser'} <= ours['memory'].keys()
        assert ours['memory']['optimiser'] >= 2*ours['memory']['parameters']
        plain = g['entries']['plain/fp32']
        assert plain['flops_per_image'] > ours['flops_per_image'] and plain['memory']['peak'] > ours['memory']['peak']
        r, = g['ratios']
        assert (r['a'], r['b'], r['rounds']) == ('ours/fp32', 'plain/fp32', 3) and r['low'] <= r['median'] <= r['high']
        assert r['median'] == pytest.approx(sorted(b/a for a,b in zip(ours['seconds'], plain['seconds']))[1])
        assert len(g['matmul']['fp32']['shapes']) >= 4 and g['matmul']['fp32']['best'] == max(g['matmul']['fp32']['shapes'].values())
    text = bench_table(res)
    assert 'ours/fp32 is' in text and 'dbot' in text and 'GFLOP/s' in text
    private = [os.uname().nodename, str(tmp_path), os.path.expanduser('~')]
    assert not [o for o in private if len(o) > 3 and o in file.read_text()]


def test_global_random_numbers_are_left_alone():
    torch.manual_seed(5); want = torch.rand(3); torch.manual_seed(5)
    run_bench([quick_load('mae')], ['ours'], rounds=1, least=.001, quiet=True)
    assert torch.equal(torch.rand(3), want)


@pytest.fixture
def variant(monkeypatch):
    "Add a row to the table of sides, for one test"
    monkeypatch.setattr(bench, 'variants', dict(variants))
    def add(name, *args, **kw): bench.variants[name] = Variant(*args, **kw)
    return add


def test_an_interrupt_keeps_what_was_measured(variant, tmp_path):
    count = []
    class Interrupted(Ours):
        def step(self, *args, **kw):
            count.append(1)
            if len(count) == 25: raise KeyboardInterrupt
            return super().step(*args, **kw)
    variant('stopped', Interrupted, 'stops')
    file = tmp_path/'b.json'
    res = run_bench([quick_load('mae'), quick_load('mae')], ['ours', 'stopped'], rounds=100, least=.001, out=file, quiet=True)
    saved = json.loads(file.read_text())
    assert res['status'] == saved['status'] == 'interrupted' and len(saved['groups']) == 1
    entries = saved['groups'][0]['entries']
    assert len(entries['ours/fp32']['seconds']) >= 3 and 'images_per_second' in entries['stopped/fp32']
    assert len(entries['ours/fp32']['seconds']) - len(entries['stopped/fp32']['seconds']) in (0, 1) and '(interrupted)' in bench_table(saved)


def test_a_variant_changes_the_model_and_surrounds_its_steps(variant):
    log = []
    @contextmanager
    def around():
        log.append('in')
        try: yield
        finally: log.append('out')
    def change(model): log.append(type(model).__name__)
    variant('switched', Ours, 'a switch', change=change, around=around)
    res = run_bench([quick_load('mae')], ['ours', 'switched'], rounds=2, least=.001, quiet=True)
    assert 'MaskedAutoencoder' in log and log.count('in') == log.count('out') == 4, log              # first look, warm-up, two rounds
    assert [(o['a'], o['b']) for o in res['groups'][0]['ratios']] == [('switched/fp32', 'ours/fp32')]


def test_what_does_not_fit_or_fails_is_a_row(variant, monkeypatch):
    class TooBig(Ours):
        def loss(self, x, part=None): raise torch.OutOfMemoryError('CUDA out of memory')
    class Nan(Ours):
        def loss(self, x, part=None): return super().loss(x)*math.nan
    variant('big', TooBig, 'too big'); variant('nan', Nan, 'not a number')
    res = run_bench([quick_load('mae')], ['big', 'nan', 'ours'], rounds=2, least=.001, quiet=True)
    e = res['groups'][0]['entries']
    assert e['big/fp32']['status'] == 'does not fit' and e['nan/fp32']['status'].startswith('failed: RuntimeError: the loss') and len(e['ours/fp32']['seconds']) == 2
    assert 'big/fp32: does not fit' in bench_table(res)
    monkeypatch.setattr(bench, '_available', lambda device: 2**20)
    res = run_bench([quick_load('mae', batch=4096)], ['ours'], rounds=2, least=.001, quiet=True)
    assert res['status'] == 'complete' and 'GiB needed' in res['groups'][0]['entries']['ours/fp32']['status']


def test_a_failure_names_no_files(variant, tmp_path):
    text = f"g++ -I{tmp_path}/x.h '{tmp_path}/a b' {os.path.expanduser('~')}/q ~/w D:\\photos\\me at 3 images/s, see https://pytorch.org/docs"
    class Fails(Ours):
        def loss(self, x, part=None): raise RuntimeError(text)
    variant('fails', Fails, 'fails')
    file,told = tmp_path/'b.json', []
    run_bench([quick_load('mae')], ['fails', 'ours'], rounds=1, least=.001, out=file, quiet=True)
    status = json.loads(file.read_text())['groups'][0]['entries']['fails/fp32']['status']
    assert status == "failed: RuntimeError: g++ -I… '… b' … … … at 3 images/s, see https://pytorch.org/docs"
    contest = Contest(quick_load('mae'), [Entry('fails')], cpu, .001, tell=told.append); contest.begin()
    assert str(tmp_path) in told[-1], 'whoever measures sees it all'


def test_sides_that_do_not_fit_together_are_built_in_turn(monkeypatch):
    monkeypatch.setattr(bench, '_available', lambda device: 3*2**20)
    monkeypatch.setattr(bench, '_first_look', lambda e, *_: e.result.update(parameters=sum(p.numel() for p in e.side.model.parameters()), flops_per_image=1.))
    contest = Contest(quick_load('mae'), [Entry('plain'), Entry('ours')], cpu, .001, tell=lambda text: None)
    contest.begin(); assert contest.fresh and not any(e.side for e in contest.entries)
    contest.round(); contest.round()
    assert contest.order == ['plain/fp32', 'ours/fp32']*2 and not any(e.side for e in contest.entries) and 'images_per_second' in contest.result()['entries']['ours/fp32']


def test_an_absent_peer_is_named_and_left_out(monkeypatch):
    monkeypatch.setattr(bench, 'is_installed', lambda package: package != 'lightly')
    res = run_bench([quick_load('mae')], ['ours', 'lightly'], rounds=1, least=.001, quiet=True)
    assert list(res['groups'][0]['entries']) == ['ours/fp32'] and "bootmae_nb[bench]" in res['groups'][0]['left_out'][0] and 'left out: lightly' in bench_table(res)
    res = run_bench([quick_load('bootmae')], ['ours', 'transformers'], ['fp32', 'fp16'], rounds=1, least=.001, quiet=True)
    assert res['groups'][0]['left_out'] == ['transformers/fp32: transformers has no bootmae, it trains mae', 'ours/fp16: fp16 is for GPUs',
                                            'transformers/fp16: transformers has no bootmae, it trains mae']


def test_the_loop_tells_what_it_waits_for():
    res = run_bench([quick_load('bootmae')], ['ours', 'fit', 'fit_cached'], rounds=2, least=.001, quiet=True)
    e = res['groups'][0]['entries']
    for k in ('fit/fp32', 'fit_cached/fp32'):
        assert e[k]['status'] == 'ok' and set(e[k]['split']) == {'data', 'step'} and 0 < e[k]['split']['data'] < sorted(e[k]['seconds'])[-1]
    assert [(o['a'], o['b']) for o in res['groups'][0]['ratios']] == [('fit/fp32', 'ours/fp32'), ('fit_cached/fp32', 'ours/fp32')]


def test_growth_finds_exponents():
    loads = growth_loads(quick_load())
    assert {o.vary for o in loads} == {'batch', 'img_size', 'mask_ratio', 'width'} and all(o.width//o.heads == 32 for o in loads)
    entry = lambda s: dict(seconds=[s], flops_per_image=s*10., memory=dict(peak=s**2))
    group = lambda vary, value, s: dict(workload=dict(vary=vary, **{vary: value}), entries={'ours/fp32': entry(s)})
    found = growth([group('batch', b, 3*b**1.5) for b in (1, 2, 4)] + [group('mask_ratio', r, 1 - r) for r in (.5, .75)])
    assert [(o['vary'], round(o['seconds'], 6), round(o['memory'], 6)) for o in found] == [('batch', 1.5, 3.), ('mask_ratio', 1., 2.)]
    res = run_bench([o for o in loads if o.vary == 'batch'][2:], ['ours'], rounds=1, least=.001, quiet=True)
    found, = res['growth']
    assert (found['over'], found['points']) == ('images', 2) and -.05 < found['flops_per_image'] < .005 and .7 < found['memory'] < 1.2


def test_the_interval_of_a_ratio():
    r = paired_ratio([1., 1., 1., 1., 1.], [2., 2., 2., 2., 10.])
    assert r['median'] == 2 and r['low'] == 2 and r['high'] == 10 and paired_ratio([], [])['rounds'] == 0


bad = [(dict(sides='ours,theirs'), "side 'theirs' is unknown"), (dict(method='moco'), "'moco' is unknown"), (dict(arch='resnet18'), 'not a plain'),
       (dict(precision='int8'), "precision 'int8'"), (dict(batch='many'), 'no list of whole numbers'), (dict(batch='0'), 'below 1'),
       (dict(compiled='maybe'), 'off, on or both'), (dict(rounds=0), 'below 1'), (dict(threads=0), 'below 1'), (dict(img_size='100'), 'not divisible'),
       (dict(mask_ratio='2'), 'outside (0, 1)'), (dict(sides=','), 'names nothing')]


@pytest.mark.parametrize('kw,words', bad)
def test_bad_input_is_refused_before_any_work(kw, words, monkeypatch):
    monkeypatch.setattr(bench, '_contest', lambda *args: pytest.fail('work began'))
    with pytest.raises(ValueError) as e: main(**dict(device='cpu') | kw)
    assert words in str(e.value)


script = '''
import sys
from bootmae_nb.cli import bootmae_bench
if __name__ == '__main__': sys.exit(bootmae_bench())
'''


@pytest.fixture
def command(tmp_path):
    "The command as its console script starts it: arguments -> list for subprocess, and its environment"
    (tmp_path/'bootmae-bench').write_text(script)
    env = dict(os.environ, BOOTMAE_DEVICE='cpu', OMP_NUM_THREADS='1')
    return SimpleNamespace(args=lambda *a: [sys.executable, str(tmp_path/'bootmae-bench'), *map(str, a)],
                           kw=dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=env))


def test_the_command(command, tmp_path):
    start = time.perf_counter(); done = subprocess.run(command.args('--help'), **command.kw)
    assert done.returncode == 0 and '--sides' in done.stdout and time.perf_counter() - start < 2
    process = subprocess.Popen(command.args('--quick', '--method', 'mae', '--sides', 'plain,ours', '--rounds', 100000, '--out', 'b.json'), **command.kw)
    for line in process.stderr:
        if line.startswith('round 3'): process.send_signal(signal.SIGINT); break
    out,err = process.communicate(timeout=60)
    saved = json.loads((tmp_path/'b.json').read_text())
    assert process.returncode == 130 and saved['status'] == 'interrupted' and len(saved['groups'][0]['entries']['ours/fp32']['seconds']) >= 3, err
    assert 'ours/fp32 is' in out and 'Traceback' not in err and '\r' not in err


@pytest.mark.slow
def test_compiled_blocks():
    res = run_bench([quick_load('mae')], ['plain', 'ours'], compiled=[False, True], rounds=2, least=.001, quiet=True)
    e = res['groups'][0]['entries']
    assert list(e) == ['plain/fp32', 'ours/fp32', 'ours/fp32/compiled'] and e['ours/fp32/compiled']['status'] == 'ok', e['ours/fp32/compiled']['status']


@pytest.mark.cuda
@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
def test_on_a_gpu(precision):
    device = torch.device('cuda')
    res = run_bench([quick_load('bootmae')], ['plain', 'ours', 'fit'], [precision], rounds=2, least=.001, device=device, quiet=True)
    for e in res['groups'][0]['entries'].values(): assert e['status'] == 'ok', e['status']
    e = res['groups'][0]['entries'][f'ours/{precision}']
    assert 0 < e['memory']['peak'] <= e['memory']['allocated'] and sum(e['split'].values()) < 10*max(e['seconds'])
    side = Ours(replace(quick_load(), batch=2), 'fp32', device).prepare(); images = side.load.images(); side.step(images)
    x,w = torch.randn(1024, 256, device=device), torch.randn(256, 256, device=device, requires_grad=True)
    def step(mark): (x @ w).exp().sum().backward(); mark(); w.grad = None
    step(lambda: None)
    assert abs(peak_memory(step, lambda: [w.grad], device) - 2*2**20) < 2**16
