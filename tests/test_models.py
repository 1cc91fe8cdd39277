"""The model in the hands of torch: compiled, under autocast, copied, and with inputs that do not fit."""
import copy
import pickle

import pytest
import torch
from fastai.torch_core import TensorImage

from bootmae_nb.losses import mim_loss
from bootmae_nb.masking import BlockMask, PatchMask, RandomMask
from bootmae_nb.models import methods, mim_model
from bootmae_nb.patches import mask_order, take

tiny = dict(arch='vit_tiny_patch16_224', img_size=(32, 48), patch_size=8, width=48, depth=2, heads=3, seed=0)


def batch(seed=0, ratio=.75):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 32, 48, generator=g), RandomMask(ratio)(2, (4, 6), g)


@pytest.mark.parametrize('name', list(methods))
def test_compiled_in_one_graph_for_all_masks(name):
    "No break in the graph, and no new one for another mask: shapes are static when the number of hidden patches is passed"
    model, graphs = mim_model(name, **tiny).eval(), []
    compiled = torch.compile(model, backend=lambda gm, _: graphs.append(gm) or gm, fullgraph=True)
    for seed in range(3):
        x, mask = batch(seed)
        a, b = compiled(x, mask, 18), model(x, mask)
        assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in b)
    assert len(graphs) == 1


@pytest.mark.parametrize('name', list(methods))
def test_bf16_autocast_stays_close_to_float32(name):
    model = mim_model(name, **tiny).eval()
    full = mim_loss(model, *batch())[0]
    with torch.autocast('cpu', torch.bfloat16): half = mim_loss(model, *batch())[0]
    assert half.dtype == torch.float32 and abs(half/full - 1) < .02
    half.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize('name', list(methods))
def test_only_what_the_loss_needs_with_equal_results(name):
    "Predictions and gradients of the hidden patches alone equal those out of all patches"
    model = mim_model(name, **tiny).eval()
    x, mask = batch()
    grads = []
    for every in (False, True):
        out = model(x, mask, all_tokens=every)
        if every:
            cut = lambda v, c: torch.cat([v[:, :c], take(v[:, c:], mask_order(mask)[1])], 1)
            out = {k: cut(v, int(model.decoders[k].with_cls)) for k,v in out.items()}
        model.zero_grad(); sum(v.square().sum() for v in out.values()).backward()
        grads.append({n: p.grad.clone() for n,p in model.named_parameters() if p.grad is not None})
    for n,g in grads[0].items(): assert (g - grads[1][n]).norm() <= 1e-4*grads[1][n].norm() + 1e-6, n


def test_hidden_pixels_are_not_seen():
    model = mim_model('bootmae', **tiny).eval()
    x, mask = batch()
    other = torch.where(mask.reshape(2, 1, 4, 6).repeat_interleave(8, 2).repeat_interleave(8, 3), torch.randn_like(x), x)
    with torch.no_grad(): a, b = model(x, mask), model(other, mask)
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(x, other)


def test_fastai_types_do_not_leak_in():
    model = mim_model('bootmae', **tiny).eval()
    x, mask = batch()
    out = model(TensorImage(x), mask.as_subclass(PatchMask))
    assert all(type(v) is torch.Tensor for v in out.values()) and type(model.teacher_features(TensorImage(x))) is torch.Tensor


def test_copies_and_pickles():
    model = mim_model('bootmae', **tiny).eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.method == model.method and all(torch.equal(a, b) for a,b in zip(model(*batch()).values(), other(*batch()).values()))


def test_injection_matters_and_can_be_switched_off():
    model = mim_model('bootmae', **tiny).eval()
    without = mim_model('bootmae', **tiny, pixel_inject=None, feature_inject=None)
    assert any('cross' in n for n,_ in model.named_parameters()) and not any('cross' in n for n,_ in without.named_parameters())
    before = model(*batch())
    for block in model.decoders['pixels'].blocks: block.cross.proj.weight.data.zero_()
    after = model(*batch())
    assert not torch.allclose(before['pixels'], after['pixels'], atol=1e-3) and torch.equal(before['features'], after['features'])


def test_a_model_without_decoders_says_so():
    model = mim_model('bootmae', **tiny)
    model.decoders.clear()
    with pytest.raises(RuntimeError, match='encoder only'): model(*batch())
    with pytest.raises(ValueError, match='same number of patches'):
        mim_model('mae', **tiny)(batch()[0], torch.cat([BlockMask(.5, .3)(1, (4, 6)), BlockMask(.75)(1, (4, 6))]))
