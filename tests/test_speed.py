"""Every switch that makes a step faster or smaller gives the numbers of the step without it"""
import copy
import gc
import pickle
import platform
import shutil
from contextlib import contextmanager, nullcontext

import pytest
import timm
import torch
from fastai.callback.core import Callback
from torch import nn

from common import quietly
from bootmae_nb import memory, vit
from bootmae_nb.data import mim_dls
from bootmae_nb.learner import mim_learner
from bootmae_nb.losses import mim_loss, mim_targets
from bootmae_nb.memory import bytes_kept, recomputed, reused
from bootmae_nb.models import activation_kinds, keep_activations, mim_model, next_stage, set_teacher
from bootmae_nb.patches import mask_order, take
from bootmae_nb.speed import attention_times, choose_attention, compile_blocks
from bootmae_nb.targets import ema_update
from bootmae_nb.vit import as_encoder, low_precision, make_encoder, tokens_after, zero_key_bias_grads
from bootmae_nb.viz import attention_maps

methods = 'bootmae', 'mae', 'dbot'
sizes = dict(arch='vit_tiny_patch16_224', img_size=(32, 48), patch_size=8, width=48, depth=3, heads=3)
decoders = {k: dict(pixel_width=48, pixel_depth=2, pixel_heads=3) | ({} if k == 'mae' else dict(feature_width=48, feature_depth=2, feature_heads=3)) for k in methods}


def model_of(method='bootmae', **kw): return mim_model(method, **sizes | decoders[method] | dict(seed=0) | kw)


def batch(model, bs=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(bs, model.in_chans, *model.img_size, generator=g), model.method.masker(bs, model.grid, g)


@contextmanager
def bf16():
    with torch.autocast('cpu', torch.bfloat16): yield


def step(model, *data, context=nullcontext, seed=1):
    "Loss and gradients of a training step"
    torch.manual_seed(seed)                                     # drop path
    model.train().zero_grad()
    with context(): loss,_ = mim_loss(model, *data)
    loss.backward()
    zero_key_bias_grads(model)
    return loss.detach(), {n: p.grad.clone() for n,p in model.named_parameters() if p.grad is not None}


def same_bits(a, b): return torch.equal(a[0], b[0]) and a[1].keys() == b[1].keys() and all(torch.equal(a[1][k], b[1][k]) for k in a[1])


def assert_close(a, b, out=1e-5, grad=1e-4):
    "Norm of the difference over norm, in float64, tensor by tensor"
    assert abs(a[0] - b[0]) <= out*abs(b[0])
    assert a[1].keys() == b[1].keys()
    for k,g in b[1].items():
        if g.norm() > 1e-7: assert (a[1][k].double() - g.double()).norm() <= grad*g.double().norm(), k


def cosine(a, b):
    x,y = (torch.cat([g.double().flatten() for g in o[1].values()]) for o in (a, b))
    return float(x @ y/(x.norm()*y.norm()))


# what is kept for the backward pass

@pytest.mark.parametrize('context', [nullcontext, bf16], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('method', methods)
def test_activations_that_are_computed_again_are_the_same_to_the_bit(method, context):
    model = model_of(method, drop_path=.3)
    data = batch(model)
    want = step(model, *data, context=context)
    for kind in activation_kinds: assert same_bits(step(keep_activations(model, kind), *data, context=context), want), kind


@pytest.mark.parametrize('method', methods)
def test_less_is_kept(method):
    model = model_of(method)
    data = batch(model)
    kept = {k: bytes_kept(lambda k=k: keep_activations(model, k)(*data))[1] for k in activation_kinds}
    assert kept['lean'] < .75*kept['keep'] and kept['checkpoint'] < .35*kept['keep']


def test_only_outputs_of_the_modules_themselves_are_left_out():
    "A tensor that lies where such an output was, a part of it, or a copy in another precision is kept as it is"
    norm,w = nn.LayerNorm(8), torch.randn(8, 8, requires_grad=True)
    x = torch.randn(4, 8, requires_grad=True)
    def f(lean):
        with recomputed(lean):
            h = norm(x)
            y = (h @ w).sum() + (h[:2] @ w).square().sum() + (h.to(torch.bfloat16) @ w.to(torch.bfloat16)).sum() + (h.T @ h).sum()
            del h
            y = y + (torch.ones(4, 8) @ w).exp().sum()
        return torch.autograd.grad(y, (x, w, *norm.parameters()))
    for a,b in zip(f(True), f(False)): assert torch.equal(a, b)


def test_a_second_backward_pass_and_no_gradients_work():
    net,x = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), torch.randn(4, 8)
    with recomputed(): y = net(x).sum()
    y.backward(retain_graph=True); first = net[1].weight.grad.clone()
    y.backward()
    assert torch.equal(net[1].weight.grad, 2*first)
    with torch.no_grad(), recomputed(): assert torch.isfinite(net(x)).all()
    assert not torch.nn.modules.module._global_forward_hooks


def test_what_is_changed_in_place_is_not_computed_again():
    "An output that was changed is kept as it is; an input, a weight or a kept tensor that is changed before the backward pass is refused, as torch does without hooks"
    norm,w,x = nn.LayerNorm(8), torch.randn(8, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    def f(lean):
        with recomputed(lean): y = (norm(x).add_(1) @ w).sum()
        return torch.autograd.grad(y, w)[0]
    assert torch.equal(f(True), f(False))
    def changed(f, *what):
        with recomputed(): y = f().sum()
        with torch.no_grad():
            for o in what: o.mul_(2)
        with pytest.raises(RuntimeError, match='was changed in place'): y.backward()
    h,data = x*1, torch.randn(4, 8)
    changed(lambda: norm(h) @ w, h)
    changed(lambda: norm(x) @ w, norm.weight)
    changed(lambda: data @ w, data)


def test_autocast_of_the_backward_pass_does_not_matter(monkeypatch):
    "On a GPU autocast makes LayerNorm give float32, whatever it is given"
    seen,real = [], nn.LayerNorm.forward
    monkeypatch.setattr(nn.LayerNorm, 'forward', lambda self, x: (seen.append(torch.is_autocast_enabled('cpu')), real(self, x))[1])
    net,x = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)).bfloat16(), torch.randn(4, 8).bfloat16()
    with recomputed(): y = net(x).sum()
    with bf16(): y.backward()
    assert seen == [False, False]


def test_auto_is_for_large_models_that_are_not_compiled():
    assert keep_activations(model_of()).activations == 'keep'
    with torch.device('meta'): large = mim_model('bootmae', 'vit_small_patch16_224')
    assert keep_activations(large).activations == 'lean'
    assert compile_blocks(large).activations == keep_activations(large).activations == 'keep'
    with pytest.raises(ValueError, match='trace compiled blocks anew in each step: choose keep or checkpoint'): keep_activations(large, 'lean')
    assert keep_activations(copy.deepcopy(large)).activations == 'lean', 'a copy is not compiled'
    with pytest.raises(ValueError, match="activations='all' is unknown: choose one of auto, keep"): keep_activations(large, 'all')


# the teacher

@pytest.mark.parametrize('kw', [dict(), dict(method='dbot'), dict(feature_blocks=(0, 2)), dict(feature_blocks=(-3, -2, -1), feature_average=True),
                                dict(teacher='frozen', teacher_depth=0), dict(class_token=False), dict(arch='vit_small_patch14_reg4_dinov2')], ids=str)
def test_targets_are_those_of_all_tokens(kw):
    model = model_of(**kw)
    images,mask = batch(model)
    hidden = mask_order(mask)[1]
    if model.decoders['features'].with_cls: hidden = torch.cat([torch.zeros_like(hidden[:, :1]), hidden + 1], 1)
    want = take(model.teacher_features(images), hidden)
    got = model.teacher_features(images, hidden)
    assert got.shape == want.shape and (got - want).norm() <= 1e-5*want.norm()


def test_a_teacher_of_another_kind_gives_some_tokens_too():
    model = model_of(img_size=48)
    beit = timm.create_model('beit_base_patch16_224', img_size=48, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0)
    set_teacher(model, beit)
    images,mask = batch(model)
    hidden = mask_order(mask)[1]
    torch.testing.assert_close(model.teacher_features(images, hidden), take(model.teacher_features(images), hidden))


def test_a_block_that_is_not_plain_runs_whole():
    block = make_encoder('vit_tiny_patch16_224', 32, patch_size=8, depth=1).vit.blocks[0]
    block.attn.attn_drop.p = .5                                # training: the draw must be that of the whole block
    x,idx = torch.randn(2, 17, 192), torch.tensor([[1, 2], [3, 4]])
    torch.manual_seed(0); want = take(block(x), idx)
    torch.manual_seed(0); assert torch.equal(tokens_after(block, x, idx), want)


@pytest.mark.parametrize('method', ['bootmae', 'dbot'])
def test_matrices_in_half_precision_are_those_of_autocast(method, monkeypatch):
    model = model_of(method)
    images,mask = batch(model)
    with bf16():
        with monkeypatch.context() as m:
            m.setattr('bootmae_nb.models.low_precision', lambda encoder, device: encoder)
            want = mim_targets(model, images, mask)['features'][0]
        assert low_precision(model.teacher, 'cpu') is not model.teacher
        assert torch.equal(mim_targets(model, images, mask)['features'][0], want)
    with torch.no_grad(): assert torch.equal(model.teacher(images)[-1], as_encoder(copy.deepcopy(model.teacher.vit))(images)[-1])     # float32 is as it was


def test_the_copy_in_half_precision_follows_every_change():
    model = model_of()
    images,_ = batch(model)
    def both(teacher=model.teacher):
        with torch.no_grad(), bf16(): return low_precision(teacher, 'cpu')(images)[-1], copy.deepcopy(teacher)(images)[-1]
    def same(both=both): return torch.equal(*both())
    assert same()
    for p in model.encoder.parameters(): p.data = p.data + .02*torch.randn_like(p)
    before = both()[0]
    ema_update(model.teacher, model.encoder, .5)
    assert same() and not torch.equal(both()[0], before)
    model.load_state_dict({k: v + .01 if v.is_floating_point() else v for k,v in model.state_dict().items()}); assert same()
    model.to(torch.float64).to(torch.float32); assert same()
    for p in model.teacher.parameters(): p.data.mul_(1.5)
    assert same(), 'an edit that torch does not count'
    model.teacher.vit.blocks[0].norm1.weight = nn.Parameter(torch.randn_like(model.teacher.vit.blocks[0].norm1.weight), requires_grad=False); assert same()
    model.teacher.vit.blocks[1].mlp.fc1.weight = nn.Parameter(torch.randn_like(model.teacher.vit.blocks[1].mlp.fc1.weight), requires_grad=False); assert same()
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(other.teacher(images)[-1], model.teacher(images)[-1])
    n = len(vit._low)
    del model, both, same; gc.collect()
    assert len(vit._low) < n                                   # nothing is kept of a model that is gone


def test_the_copy_in_half_precision_outlives_inference_mode():
    with torch.inference_mode(): other = model_of()
    model = model_of()
    images,_ = batch(model)
    with bf16():
        with torch.inference_mode(): model.teacher_features(images)
        ema_update(model.teacher, model_of(seed=1).encoder, .5)
        assert torch.equal(model.teacher_features(images), copy.deepcopy(model).teacher_features(images))
        assert other.teacher_features(images).isfinite().all()


def test_bf16_gradients_point_where_float32_does():
    for method in methods:
        model = model_of(method)
        data = batch(model, 8)
        want = step(model, *data)
        for kind in activation_kinds: assert cosine(step(keep_activations(model, kind), *data, context=bf16), want) > .999, (method, kind)


# attention

@pytest.mark.parametrize('method', methods)
def test_both_attention_kernels_agree(method):
    model = model_of(method)
    data = batch(model)
    want = step(model, *data)
    model.attention = 'math'
    assert_close(step(model, *data), want)


def test_attention_is_measured_and_chosen(monkeypatch):
    model = model_of()
    assert set(attention_times(model, 2, rounds=1)) == {'fused', 'math'}
    monkeypatch.setattr('bootmae_nb.speed.attention_times', lambda *args: dict(fused=2., math=1.))
    assert list(choose_attention(model)) == ['math', 'fused'] and model.attention == 'math'


# compiled

@pytest.mark.parametrize('method', methods)
def test_compiled_blocks_agree_and_new_masks_need_no_new_graph(method):
    torch._dynamo.reset()
    plain,quick = model_of(method), compile_blocks(model_of(method), backend='aot_eager')
    for i in range(5):
        data = batch(plain, seed=i)
        if i == 4: keep_activations(quick, 'checkpoint')
        with torch.compiler.set_stance('fail_on_recompile' if i else 'default'): assert_close(step(quick, *data), step(plain, *data))
    with torch.no_grad():
        outs = plain.eval()(*data, all_tokens=True).values(), quick.eval()(*data, all_tokens=True).values()
        for a,b in zip(*outs): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_compiled_model_is_saved_copied_and_staged():
    quick = compile_blocks(model_of('dbot').eval(), backend='aot_eager')
    assert list(quick.state_dict()) == list(model_of('dbot').state_dict())
    images,_ = batch(quick)
    for other in (pickle.loads(pickle.dumps(quick)), copy.deepcopy(quick)):
        assert other.encoder.vit.blocks[0]._compiled_call_impl is None
        torch.testing.assert_close(other.encoder(images)[-1], quick.encoder(images)[-1], rtol=1e-4, atol=1e-5)
    next_stage(quick, 1)
    assert quick.teacher.vit.blocks[0]._compiled_call_impl is not None
    with torch.no_grad(), bf16(): assert low_precision(quick.teacher, 'cpu').vit.blocks[0]._compiled_call_impl is not None
    with pytest.raises(ValueError, match="compile mode 'fast' is unknown: choose one of default"): compile_blocks(quick, 'fast')
    for mode in 'reduce-overhead', 'max-autotune':
        with pytest.raises(ValueError, match='records CUDA graphs, whose outputs do not last'): compile_blocks(quick, mode)


def test_attention_of_a_compiled_model_can_be_looked_at():
    model,quick = model_of().eval(), compile_blocks(model_of().eval(), backend='aot_eager')
    images,_ = batch(model)
    with torch.no_grad(): quick.encoder(images[:1])
    for i in 0, 1: torch.testing.assert_close(attention_maps(quick, images[i]), attention_maps(model, images[i]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++') and not shutil.which('clang++'), reason='needs a C++ compiler, and there is none here')
@pytest.mark.parametrize('context', [nullcontext, bf16], ids=['fp32', 'bf16'])
def test_really_compiled_blocks_agree(context):
    torch._dynamo.reset()
    plain,quick = model_of(), compile_blocks(model_of())
    for i in range(3):
        data = batch(plain, seed=i)
        with torch.compiler.set_stance('fail_on_recompile' if i else 'default'): a,b = step(quick, *data, context=context), step(plain, *data, context=context)
        if context is nullcontext: assert_close(a, b)
        else: assert cosine(a, b) > .999


# memory that is used again

glibc = pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='needs the GNU C library')


@glibc
def test_the_allocator_is_switched_once_and_back(monkeypatch):
    calls = []
    monkeypatch.setattr(memory, '_keep', lambda lib, on: calls.append(on))
    with reused():
        with reused(), reused(False): pass
        assert calls == [True]
    assert calls == [True, False]
    with pytest.raises(KeyError), reused(): raise KeyError
    assert calls == [True, False]*2 and memory._depth == 0


@glibc
def test_the_settings_are_accepted():
    lib = memory._glibc()
    asked = []
    class Recorded:
        def mallopt(self, *args): asked.append(lib.mallopt(*args))
        def malloc_trim(self, pad): lib.malloc_trim(pad)
    memory._keep(Recorded(), True); memory._keep(Recorded(), False)
    assert asked and all(o == 1 for o in asked)                # mallopt says 1 for what it takes


def test_where_there_is_no_such_library_nothing_happens(monkeypatch):
    monkeypatch.setattr(memory, '_glibc', lambda: None)
    with reused(): assert torch.ones(3).sum() == 3


# through the learner

def learner(**kw):
    dls = mim_dls(img_size=(32, 48), bs=4, crops_per_image=1, device='cpu')
    return mim_learner(dls, **{k: v for k,v in sizes.items() if k != 'img_size'} | decoders['bootmae'], seed=3, **kw)


@glibc
def test_a_fit_uses_memory_again_and_gives_it_back_after_an_error(monkeypatch):
    calls = []
    monkeypatch.setattr(memory, '_keep', lambda lib, on: calls.append(on))
    learn = learner()
    quietly(learn, 'fit', 1)
    assert calls == [True, False]
    class Fails(Callback):
        def after_loss(self): raise ZeroDivisionError('on purpose')
    with pytest.raises(ZeroDivisionError): quietly(learn, 'fit', 1, cbs=Fails())
    assert calls == [True, False]*2


def test_the_learner_takes_the_switches():
    want,*others = [learner(**kw) for kw in (dict(), dict(activations='lean'), dict(activations='checkpoint'))]
    for learn in (want, *others): quietly(learn, 'fit', 1, 1e-3)
    for learn in others:
        for a,b in zip(learn.model.state_dict().values(), want.model.state_dict().values()): assert torch.equal(a, b)
    quick = learner(compile=True)
    assert quick.model.encoder.compiled == dict(dynamic=False, mode='default') and quick.model.activations == 'keep'
    with pytest.raises(ValueError, match='compile mode'): learner(compile='fast')
    with pytest.raises(ValueError, match='activations='): learner(activations='none')


@pytest.mark.cuda
@pytest.mark.parametrize('method', methods)
def test_switches_on_a_gpu(method):
    model = model_of(method).cuda()
    data = [o.cuda() for o in batch(model, 8)]
    want = step(model, *data)
    for kind in activation_kinds: assert_close(step(keep_activations(model, kind), *data), want)
    def amp(): return torch.autocast('cuda', torch.bfloat16)
    assert cosine(step(model, *data, context=amp), want) > .999
    keep_activations(model, 'keep')
    quick = compile_blocks(copy.deepcopy(model))
    assert_close(step(quick, *data), want, 1e-4, 1e-3)
