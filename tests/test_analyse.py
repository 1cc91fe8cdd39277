"""Figures of each block against loops that spell them out, what must not change them, and pictures that show the table."""
import math
import random
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bootmae_nb import analyse as module
from bootmae_nb.analyse import (analyse, analysis_sheet, attention_distance, cka, cka_matrix, effective_rank, effective_ranks, mean_cosine, mean_cosines,
                                patch_distances, plot_attention_distance, plot_cka, plot_cosine, plot_effective_rank, plot_singular_values,
                                singular_value_share, singular_values, student_teacher)
from bootmae_nb.models import encoder_only, mim_model, set_teacher
from bootmae_nb.viz import to_stats

tiny = dict(arch='vit_tiny_patch16_224', img_size=(24, 40), patch_size=8, width=24, depth=3, heads=3)
small = dict(pixel_width=24, pixel_depth=1, pixel_heads=3)
features = dict(feature_width=24, feature_depth=1, feature_heads=3)


def rand(*shape, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
def randn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def images(n=5, seed=0): return rand(n, 3, 24, 40, seed=seed)
def close(a, b, eps=1e-6): return np.allclose(np.asarray(a, float), np.asarray(b, float), rtol=eps, atol=eps)


def strong(model, seed=0):
    "Weights so large that attention is far from even"
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.ndim == 2: p.data = torch.randn(p.shape, generator=g)*.5
    return model


def mae_model(**kw): return strong(mim_model('mae', **tiny | kw, **small, seed=0))
def bootmae_model(**kw): return strong(mim_model('bootmae', **tiny | kw, **small, **features, seed=0))
def timm_vit(**kw):
    size = dict(img_size=(24, 40), patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=0)
    with torch.random.fork_rng(): torch.manual_seed(0); return strong(timm.create_model('vit_tiny_patch16_224', **size | kw))


# attention distance

def naive_distances(vit, x, renormalise=True):
    "Softmax of q k^T from the inputs of each attention layer, then loops over images, heads, queries and keys"
    seen, hooks = [], [b.attn.register_forward_pre_hook(lambda m, a: seen.append((m, a[0]))) for b in vit.blocks]
    with torch.no_grad(): vit.eval().forward_features(x)
    for h in hooks: h.remove()
    (rows, cols), (ph, pw), n = vit.patch_embed.grid_size, vit.patch_embed.patch_size, vit.num_prefix_tokens
    res = torch.zeros(len(seen), vit.blocks[0].attn.num_heads, dtype=torch.float64)
    for i,(m,h) in enumerate(seen):
        with torch.no_grad():
            q,k,_ = m.qkv(h).reshape(*h.shape[:2], 3, m.num_heads, -1).permute(2, 0, 3, 1, 4)
            w = (m.q_norm(q)*m.scale @ m.k_norm(k).transpose(-1, -2)).softmax(-1).double()
        for b in range(len(x)):
            for head in range(m.num_heads):
                for a in range(rows*cols):
                    total = weight = 0.
                    for c in range(rows*cols):
                        d = math.hypot((a//cols - c//cols)*ph, (a % cols - c % cols)*pw)
                        total += w[b, head, n + a, n + c].item()*d; weight += w[b, head, n + a, n + c].item()
                    res[i, head] += (total/weight if renormalise else total)/(rows*cols*len(x))
    return res


@pytest.mark.parametrize('kw', [{}, dict(qk_norm=True), dict(qkv_bias=False), dict(class_token=False, global_pool='avg'), dict(reg_tokens=2), dict(patch_size=(8, 4))],
                         ids=lambda o: next(iter(o), 'plain'))
@pytest.mark.parametrize('renormalise', [True, False])
def test_attention_distance_equals_loops(kw, renormalise):
    vit, x = timm_vit(**kw), images(2)
    got = attention_distance(vit, (x + 1)/2, renormalise=renormalise, stats=((.5,)*3, (.5,)*3))
    want = naive_distances(vit, x, renormalise)
    assert got.shape == (3, 3) and got.dtype == torch.float64 and close(got, want, 1e-5)
    assert want.std() > .05                                                                  # the test would not see a wrong softmax else


def test_attention_distance_of_our_models():
    model, x = bootmae_model(), images(3)
    want = naive_distances(model.encoder.vit, to_stats(model, x))
    assert close(attention_distance(model, x), want, 1e-5)
    assert close(attention_distance(model.encoder, x, stats=(model.method.mean, model.method.std)), want, 1e-5)
    assert close(attention_distance(encoder_only(model), x), want, 1e-5)
    strong(model.teacher, seed=1)
    assert close(attention_distance(model, x, which='teacher'), naive_distances(model.teacher.vit, to_stats(model, x)), 1e-5)


def test_patches_and_pixels():
    model, x = mae_model(), images(2)
    assert close(attention_distance(model, x, 'patches')*8, attention_distance(model, x), 1e-6)
    flat = timm_vit(patch_size=(8, 4))
    assert not close(attention_distance(flat, x, 'patches')*8, attention_distance(flat, x), 1e-2)


def test_even_and_own_attention():
    vit = timm_vit(class_token=False, global_pool='avg'); x = images(2)
    for b in vit.blocks: b.attn.qkv.weight.data[:24] = 0; b.attn.qkv.bias.data[:24] = 0
    assert close(attention_distance(vit, x), torch.full((3, 3), patch_distances((3, 5), 8).mean()), 1e-5)

    class Far(nn.Module):
        "Queries and keys that are unit vectors of the token's place, times a lot"
        num_heads = 2
        def forward(self, x, **kw):
            e = torch.eye(x.shape[1]).expand(len(x), 2, -1, -1)*100
            return F.scaled_dot_product_attention(e, e, e).mean(1)[..., :1]*0 + x
    for b in vit.blocks: b.attn = Far()
    assert close(attention_distance(vit, x), torch.zeros(3, 2))
    assert analyse(vit, x).attention_px.tolist() == [0, 0, 0]


def test_mean_distance_of_even_attention_is_analytic():
    n = 7                                                                                    # on a line: (n^2 - 1)/(3 n)
    assert close(patch_distances((1, n)).mean(), (n*n - 1)/(3*n))
    assert close(patch_distances((n, 1), (5, 3)).mean(), 5*(n*n - 1)/(3*n))


def test_memory_is_bounded_without_changing_anything():
    q, k = randn(3, 2, 16, 4).float(), randn(3, 2, 16, 4, seed=1).float()
    dist = torch.stack([patch_distances((3, 5), o) for o in (8, 1)]).float()
    for bias in None, randn(1, 2, 16, 16, seed=2).float(), randn(3, 2, 16, 16, seed=3) > -1.5:
        want = module._distance_sums(q, k, bias, None, 1, dist, True)
        for most in 1, 100, 500, 1100: assert close(module._distance_sums(q, k, bias, None, 1, dist, True, max_values=most), want)


def test_tables_of_relative_positions_count():
    beit = timm.create_model('beit_base_patch16_224', img_size=48, embed_dim=24, depth=2, num_heads=3, num_classes=0, mlp_ratio=1.)
    x = rand(2, 3, 48, 48)
    before = attention_distance(beit, x)
    for b in beit.blocks: b.attn.relative_position_bias_table.data[:] = -50.
    assert close(before, attention_distance(beit, x), 1e-4)                                   # a constant changes no softmax
    for b in beit.blocks:
        own = b.attn.relative_position_index[1, 1]
        b.attn.relative_position_bias_table.data[own] = 50.
    assert close(attention_distance(beit, x), torch.zeros(2, 3))


def test_rotary_and_unfused_attention():
    eva = timm.create_model('eva02_tiny_patch14_224', img_size=56, depth=2, num_classes=0)
    assert (attention_distance(eva, rand(1, 3, 56, 56)) > 0).all()
    vit = timm_vit(); want = attention_distance(vit, images())
    for b in vit.blocks: b.attn.fused_attn = False
    assert close(attention_distance(vit, images()), want) and not any(b.attn.fused_attn for b in vit.blocks)


def test_blocks_that_attend_in_another_way_are_refused():
    vit = timm_vit()
    class Twice(nn.Module):
        def __init__(self, attn): super().__init__(); self.attn = attn
        def forward(self, x, **kw): return self.attn(x) + self.attn(x)
    vit.blocks[1].attn = Twice(vit.blocks[1].attn)
    with pytest.raises(ValueError, match="block 1, a Block, calls torch's attention 2 times"): attention_distance(vit, images())
    assert singular_values(vit, images()).shape == (3, 5)                                     # which asks for no attention


# singular values, ranks, cosines

def naive_share(x, k, centred, unit, cumulative):
    x = np.asarray(x, float)
    if unit: x = x/np.linalg.norm(x, axis=1, keepdims=True)
    if centred: x = x - x.mean(0)
    s = np.linalg.svd(x, compute_uv=False)
    return [(s[:i + 1] if cumulative else s[i:i + 1]).sum()/s.sum() for i in range(k)]


@pytest.mark.parametrize('shape', [(6, 20), (20, 6)])
@pytest.mark.parametrize('centred', [False, True])
@pytest.mark.parametrize('unit', [False, True])
@pytest.mark.parametrize('cumulative', [False, True])
def test_shares_equal_numpy(shape, centred, unit, cumulative):
    x = randn(2, *shape) + 1
    assert close(singular_value_share(x, 3, centred, unit, cumulative), [naive_share(o, 3, centred, unit, cumulative) for o in x])


def tokens(model, x):
    with torch.no_grad(): return [model.eval().encoder(to_stats(model, x), keep=(i,))[i][:, 1:] for i in range(3)]


@pytest.mark.parametrize('centred', [False, True])
def test_model_shares_equal_numpy_image_by_image(centred):
    model, x = mae_model(), images(3)
    want = [np.mean([naive_share(o, 5, centred, True, True) for o in t], 0) for t in tokens(model, x)]
    assert close(singular_values(model, x, centred=centred), want, 1e-5)
    alone = singular_values(model, x, k=2, cumulative=False)
    assert alone.shape == (3, 2) and close(alone.cumsum(-1)[:, 1], singular_values(model, x)[:, 1])


def test_more_singular_values_than_there_are():
    share = singular_value_share(randn(3, 8), 5)
    assert close(share[2:], [1, 1, 1]) and singular_values(mae_model(), images(2), k=40)[:, -1].tolist() == pytest.approx([1, 1, 1])


def naive_rank(x, centred=False):
    x = np.asarray(x, float); x = x - x.mean(0) if centred else x
    p = np.linalg.svd(x, compute_uv=False); p = p/p.sum(); p = p[p > 1e-12]
    return math.exp(-(p*np.log(p)).sum())


def test_effective_rank_equals_numpy_and_known_values():
    x = randn(2, 9, 5) + 2
    for c in False, True: assert close(effective_rank(x, c), [naive_rank(o, c) for o in x], 1e-5)
    assert close(effective_rank(torch.eye(7)), 7) and close(effective_rank(randn(5, 1)*randn(1, 6)), 1)
    assert effective_rank(torch.ones(5, 4), centred=True) == 0 and effective_rank(torch.zeros(5, 4)) == 0


@pytest.mark.parametrize('bs', [2, 64])
def test_model_ranks_and_cosines(bs):
    model, x = mae_model(), images(7); outs = tokens(model, x)
    ranks, cosines = effective_ranks(model, x, bs=bs), mean_cosines(model, x, bs=bs)
    for i,t in enumerate(outs):
        assert close(ranks['tokens'][i], [naive_rank(F.normalize(o.double(), dim=-1)) for o in t], 1e-4)
        assert close(ranks['images'][i], naive_rank(t.double().mean(1), centred=True), 1e-4)
        assert close(cosines['tokens'][i], [naive_cosine(o) for o in t], 1e-5) and close(cosines['images'][i], naive_cosine(t.double().mean(1)), 1e-5)
    assert close(effective_ranks(model, x, centred=False)['images'][0], naive_rank(outs[0].double().mean(1)), 1e-4)
    assert close(effective_ranks(model, x, centred=True, unit=False)['tokens'][2], [naive_rank(o, True) for o in outs[2].double()], 1e-4)
    with torch.no_grad(): cls = model.encoder(to_stats(model, x))[-1][:, 0]
    assert close(mean_cosines(model, x, pool='cls')['images'][2], naive_cosine(cls), 1e-5)


def naive_cosine(x): return np.mean([torch.cosine_similarity(a.double(), b.double(), dim=0).item() for a,b in combinations(x, 2)])


def test_mean_cosine():
    x = randn(2, 6, 4)
    assert close(mean_cosine(x), [naive_cosine(o) for o in x])
    assert close(mean_cosine(torch.stack([x[0, 0], -x[0, 0]])), -1) and mean_cosine(x[:, :1]).isnan().all()


def test_a_collapsed_model_looks_collapsed():
    model = mae_model()
    model.encoder.vit.patch_embed.proj.weight.data.zero_()                                    # nothing of the image gets in
    res = analyse(model, images(6))
    assert close(res.cosine_images.tolist(), [1]*3) and res.rank_images.tolist() == [0]*3
    assert cka_matrix(model, model, images(6)).isnan().all()
    model.encoder.vit.pos_embed.data.zero_()
    res = analyse(model, images(6))
    assert close(res.cosine_tokens.tolist(), [1]*3) and close(res.top1.tolist(), [1]*3, 1e-5) and close(res.rank_tokens.tolist(), [1]*3, 1e-5)


# CKA

def gram_cka(a, b, debiased):
    "The formula with Gram matrices, written out (Song et al. 2012, eq. 5; Kornblith et al. 2019, eq. 3)"
    n = len(a); K, L, one, H = a @ a.T, b @ b.T, torch.ones(n, dtype=a.dtype), torch.eye(n, dtype=a.dtype) - 1/n
    def hsic(K, L):
        if not debiased: return (K @ H @ L @ H).trace()/(n - 1)**2
        K, L = K - K.diag().diag(), L - L.diag().diag()
        return ((K @ L).trace() + (one @ K @ one)*(one @ L @ one)/((n - 1)*(n - 2)) - 2/(n - 2)*(one @ K @ L @ one))/(n*(n - 3))
    return hsic(K, L)/(hsic(K, K)*hsic(L, L)).sqrt()


@pytest.mark.parametrize('n,d,e', [(4, 3, 2), (30, 8, 5), (12, 40, 20)])
@pytest.mark.parametrize('debiased', [False, True])
def test_cka_equals_the_gram_formula(n, d, e, debiased):
    a = randn(n, d) + 3; b = a[:, :2] @ randn(2, e, seed=1) + .5*randn(n, e, seed=2) - 1
    assert close(cka(a, b, debiased), gram_cka(a, b, debiased), 1e-9)
    g = [module._centred_grams(o, debiased) for o in (a, b)]
    assert close((g[0]*g[1]).sum()/(g[0].norm()*g[1].norm()), gram_cka(a, b, debiased), 1e-9)


@pytest.mark.parametrize('debiased', [False, True])
def test_cka_does_not_see_rotation_scale_and_shift(debiased):
    a, b = randn(20, 12), randn(20, 12, seed=1) + randn(20, 12)
    turn = torch.linalg.qr(randn(12, 12, seed=2))[0]
    assert close(cka(a, a, debiased), 1) and close(cka(a, 5*a @ turn - 2, debiased), 1)
    assert close(cka(a @ turn, .01*b, debiased), cka(a, b, debiased)) and close(cka(a, b, debiased), cka(b, a, debiased))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert close(cka(a[order], b[order], debiased), cka(a, b, debiased)) and abs(cka(a, b[order], debiased) - cka(a, b, debiased)) > .1
    assert cka(a, a*torch.linspace(.01, 5, 12), debiased) < .99                               # other stretchings of axes do count


def test_unrelated_features_are_near_0_only_without_bias():
    both = [(cka(a, b), cka(a, b, debiased=False)) for a,b in ((randn(40, 100, seed=i), randn(40, 100, seed=i + 99)) for i in range(20))]
    unbiased, biased = map(np.mean, zip(*both))
    assert abs(unbiased) < .03 and biased > .6


def test_minibatches():
    a = randn(403, 10); b = a + randn(403, 10, seed=1)
    parts = [(i, min(i + 50, 403) if i < 350 else 403) for i in range(0, 400, 50)]
    assert parts[-1] == (350, 403)                                                           # three are left over, and are no group
    def hsic(x, y): return sum((j - i)*module._hsic(x[i:j] - x[i:j].mean(0), y[i:j] - y[i:j].mean(0), True) for i,j in parts)
    assert close(cka(a, b, batch=50), hsic(a, b)/(hsic(a, a)*hsic(b, b)).sqrt(), 1e-9)
    assert abs(cka(a, b, batch=50) - cka(a, b)) < .02 and close(cka(a, b, batch=400), cka(a, b))


def test_cka_matrix_equals_cka_of_features():
    one, two, x = mae_model(), strong(mim_model('mae', **tiny | dict(depth=2, width=36), **small, seed=0), 5), images(23)
    def pooled(m): return [o.mean(1).double() for o in (m.eval().encoder(to_stats(m, x), keep=(i,))[i][:, 1:] for i in range(m.encoder.depth))]
    with torch.no_grad(): a, b = pooled(one), pooled(two)
    for kw in dict(), dict(debiased=False):
        want = [[cka(p, q, **kw) for q in b] for p in a]
        assert close(cka_matrix(one, two, x, **kw), want, 1e-5) and close(cka_matrix(one, two, x, bs=5, **kw), want, 1e-5)
    want = [[cka(p, q, batch=8) for q in b] for p in a]
    for bs in 3, 8, 64: assert close(cka_matrix(one, two, x, batch=8, bs=bs), want, 1e-5)
    assert close(cka_matrix(two, one, x), cka_matrix(one, two, x).T)


def test_student_is_its_teacher_at_first():
    model = mim_model('bootmae', **tiny, **small, **features, seed=0)
    m = student_teacher(model, images(9))
    assert close(m.diagonal(), torch.ones(3)) and close(m, m.T) and m[0, 2] < .9999
    strong(model.teacher, 3)
    assert (student_teacher(model, images(9)).diagonal() < .99).all()


def test_external_teacher_sees_its_own_size_and_statistics():
    vit = timm.create_model('vit_tiny_patch16_224', img_size=48, patch_size=16, embed_dim=24, depth=2, num_heads=2, num_classes=0)
    model = set_teacher(bootmae_model(img_size=24, targets=('features',)), strong(vit, 4), mean=(0, 0, 0), std=(1, 1, 1))
    x = rand(5, 3, 24, 24)
    big = F.interpolate(x, 48, mode='bicubic', antialias=True)
    got, want = singular_values(model, x, which='teacher'), singular_values(vit, big, stats=False)
    assert got.shape == (2, 5) and close(got, want, 1e-4)
    assert cka_matrix(model, model, x, ('student', 'teacher')).shape == (3, 2)


# all together

def same_table(a, b, eps=1e-6):
    heads = all(close(o, p, 1e-5) for o,p in zip(a.heads_px, b.heads_px))
    pd.testing.assert_frame_equal(a.drop(columns='heads_px'), b.drop(columns='heads_px'), rtol=eps, atol=eps)
    return heads


def test_table_equals_single_figures():
    model, x = bootmae_model(), images(6)
    res = analyse(model, x)
    assert res.model.tolist() == ['bootmae']*3 and res.block.tolist() == [0, 1, 2] and close(res.depth.tolist(), [1/3, 2/3, 1])
    d, ranks, cosines = attention_distance(model, x), effective_ranks(model, x), mean_cosines(model, x)
    assert close(res.heads_px.tolist(), d) and close(res.attention_px.tolist(), d.mean(1)) and close(res.attention_patches.tolist(), d.mean(1)/8)
    assert close(res[[f'top{k}' for k in range(1, 6)]].to_numpy(), singular_values(model, x)) and close(res.rank_images.tolist(), ranks['images'])
    assert close(res.rank_tokens.tolist(), ranks['tokens'].mean(1)) and close(res.cosine_images.tolist(), cosines['images'])
    assert close(res.cosine_tokens.tolist(), cosines['tokens'].mean(1)) and close(res.even_px.unique(), [patch_distances((3, 5), 8).mean()])


def test_order_batches_and_loaders_do_not_matter():
    model, x = bootmae_model(), images(11)
    want = analyse(model, x)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    assert same_table(analyse(model, x[order]), want, 1e-5) and same_table(analyse(model, x, bs=3), want, 1e-5) and same_table(analyse(model, list(x)), want, 1e-5)
    loader = DataLoader(TensorDataset(x, torch.arange(11)), batch_size=4, shuffle=True)
    assert same_table(analyse(model, loader), want, 1e-5)
    assert close(cka_matrix(model, model, x[order]), cka_matrix(model, model, x), 1e-5)
    assert close(cka_matrix(model, model, loader).diagonal(), torch.ones(3))                 # shuffled, but both see the same images


def test_names_and_both_networks():
    model, vit, x = bootmae_model(), timm_vit(depth=2), images()
    names = lambda *a, **kw: analyse(*a, x, **kw).model.unique().tolist()
    assert names([model, model, vit]) == ['bootmae 1', 'bootmae 2', 'VisionTransformer'] and names(dict(a=model, b=vit)) == ['a', 'b']
    assert names(model, which=('student', 'teacher')) == ['student', 'teacher'] and names(dict(a=model), which='teacher') == ['a']
    assert names([model, model], which=('student', 'teacher')) == ['bootmae 1 student', 'bootmae 1 teacher', 'bootmae 2 student', 'bootmae 2 teacher']


def test_nothing_is_left_behind():
    model, x = bootmae_model(drop_path=.5), images()
    model.train(); model.encoder.vit.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    res = analyse(model, x, which=('student', 'teacher')); again = analyse(model, x, which=('student', 'teacher')); student_teacher(model, x)
    assert same_table(res, again, 0) and [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1] and np.random.get_state()[1].tolist() == states[2]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError): analyse(model, x*300)
    assert [m.training for m in model.modules()] == modes and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_in_half_precision():
    model, x = mim_model('mae', **tiny, **small, seed=0), images(8)
    want, pairs = analyse(model, x), cka_matrix(model, model, x)
    with torch.autocast('cpu', torch.bfloat16): got, half = analyse(model, x), cka_matrix(model, model, x)
    for c in 'attention_px', 'top1', 'rank_tokens', 'cosine_images', 'cosine_tokens': np.testing.assert_allclose(got[c], want[c], rtol=.03)
    assert close(half.diagonal(), torch.ones(3)) and close(half, pairs, .05)
    np.testing.assert_allclose(analyse(model.bfloat16(), x).attention_px, want.attention_px, rtol=.03)


def test_statistics_are_exact_under_autocast():
    a, b = randn(40, 20).float(), randn(40, 20, seed=1).float()
    with torch.autocast('cpu', torch.bfloat16):
        assert close(cka(a, b), gram_cka(a.double(), b.double(), True), 1e-6) and close(effective_rank(a), naive_rank(a), 1e-5)
        assert close(singular_value_share(a, 3), naive_share(a, 3, False, True, True), 1e-6)

    class Fixed(nn.Module):
        "Queries and keys in float32, whatever autocast does to layers"
        def forward(self, x, **kw):
            q, k = (2*randn(2, 3, 16, 8, seed=i).float() for i in (2, 3))
            return x + 0*F.scaled_dot_product_attention(q, k, k).sum()
    vit = timm_vit()
    for b in vit.blocks: b.attn = Fixed()
    want = attention_distance(vit, images(2))
    with torch.autocast('cpu', torch.bfloat16): assert close(attention_distance(vit, images(2)), want, 1e-7)


@pytest.mark.parametrize('f', [analyse, attention_distance, singular_values, lambda m, x: cka_matrix(m, m, x), analysis_sheet],
                         ids=['table', 'attention', 'values', 'cka', 'sheet'])
def test_wrong_images(f):
    model = mae_model()
    with pytest.raises(ValueError, match='there are no images'): f(model, images(0))
    with pytest.raises(ValueError, match='there are no images'): f(model, DataLoader(TensorDataset(images()), batch_size=9, drop_last=True))
    with pytest.raises(ValueError, match='expected floats from 0 to 1'): f(model, images()*255)
    with pytest.raises(ValueError, match='expected floats from 0 to 1'): f(model, (images() - .45)/.22)
    with pytest.raises(ValueError, match=r'images of shape \(5, 3, 24, 24\) do not fit this encoder'): f(model, images()[..., :24])
    with pytest.raises(ValueError, match='images have 2 shapes'): f(model, [images()[0], images()[0][:, :16], *images()])
    with pytest.raises(ValueError, match=r'expected \(B, C, H, W\)'): f(model, images()[0])
    with pytest.raises(ValueError, match='come after others of'): f(timm_vit(dynamic_img_size=True), [images(2), images(2)[..., :16]].__iter__())


def test_wrong_models():
    model, x = bootmae_model(), images()
    for make,error,words in ((lambda: timm.create_model('resnet18'), TypeError, 'a ResNet has no features'),
                             (lambda: nn.Linear(2, 2), TypeError, 'a Linear has no features'), (lambda: model.encoder, ValueError, 'does not know its input statistics'),
                             (lambda: [], ValueError, 'there is no model'), (lambda: timm_vit(depth=0), ValueError, 'has no blocks, only its embedding')):
        with pytest.raises(error, match=words): analyse(make(), x)
    for make,error,words in ((lambda: timm_vit(), TypeError, 'a VisionTransformer has no teacher'), (lambda: encoder_only(model), ValueError, 'model has no teacher'),
                             (lambda: mae_model(), ValueError, 'this mae model has no teacher'),
                             (lambda: mim_model('dbot', **tiny, **features, teacher_depth=0), ValueError, 'the teacher of dbot has no blocks')):
        with pytest.raises(error, match=words): analyse(make(), x, which='teacher')
    with pytest.raises(ValueError, match="which='tutor' is unknown"): analyse(model, x, which='tutor')
    with pytest.raises(ValueError, match='no class token'): cka_matrix(timm_vit(class_token=False, global_pool='avg'), model, x, pool='cls')
    model.encoder.vit.blocks[1].mlp.fc2.bias.data[0] = float('nan')
    with pytest.raises(ValueError, match='tokens after block 1 of bootmae hold NaN'): analyse(model, x)


def test_wrong_numbers():
    model, x = mae_model(), images()
    for call,words in ((lambda: analyse(model, x[:1]), '1 image is too few'), (lambda: cka_matrix(model, model, x[:3]), '3 images are too few'),
                       (lambda: cka_matrix(model, model, DataLoader(TensorDataset(x[:3]))), '3 images are too few'),
                       (lambda: cka_matrix(model, model, x, batch=2), 'batch=2 images are too few'), (lambda: cka(randn(3, 2), randn(3, 2)), '3 images are too few'),
                       (lambda: cka(randn(5, 2), randn(6, 2)), '5 and 6 rows'), (lambda: cka(randn(9, 2), randn(9, 2), False, 4), 'plain CKA cannot be averaged'),
                       (lambda: cka(torch.ones(9, 2), randn(9, 2)), 'the first features are the same for all images'),
                       (lambda: cka(randn(9, 2), randn(9, 2)*float('nan')), 'hold NaN'), (lambda: cka(randn(9), randn(9)), r'expected \(N, D\)'),
                       (lambda: cka_matrix(model, model, x, which=('student',)*3), 'names 3 networks'),
                       (lambda: attention_distance(model, x, 'cm'), "unit='cm' is unknown"),
                       (lambda: singular_values(model, x, k=0), 'k=0'), (lambda: singular_value_share(randn(3, 3), 0), 'k=0'),
                       (lambda: analyse(model, x, pool='max'), "pool 'max'"),
                       (lambda: effective_rank(randn(3)), r'expected \(..., N, D\)'), (lambda: plot_cosine(analyse(model, x), 'rows'), "of='rows' is unknown"),
                       (lambda: plot_cka(randn(3)), 'pass what cka_matrix returns'), (lambda: plot_cosine(analyse(model, x)[:0]), 'the table has no rows')):
        with pytest.raises(ValueError, match=words): call()


# pictures

def test_pictures_show_the_table():
    one, two, x = bootmae_model(), timm_vit(depth=2), images()
    table = analyse(dict(one=one, two=two), x)
    for plot,column in ((plot_attention_distance, 'attention_px'), (plot_cosine, 'cosine_images'),
                        (lambda t, **kw: plot_effective_rank(t, 'images', **kw), 'rank_images'),
                        (lambda t, **kw: plot_cosine(t, 'tokens', **kw), 'cosine_tokens'), (plot_effective_rank, 'rank_tokens'), (plot_singular_values, 'top1')):
        ax = plot(table)
        lines = {o.get_label(): o for o in ax.get_lines()}
        for name in 'one', 'two':
            rows = table[table.model == name]
            assert lines[name].get_ydata().tolist() == rows[column].tolist() and lines[name].get_xdata().tolist() == rows.depth.tolist()
        assert lines['one'].get_color() != lines['two'].get_color() and lines['one'].get_marker() != lines['two'].get_marker()
        assert ax.get_xlabel() == 'depth (share of blocks)' and plot(table[table.model == 'one']).get_xlabel() == 'block'
        assert plot(table, relative=False).get_xlabel() == 'block' and ax.get_ylabel()
        assert [o.get_text() for o in ax.get_legend().get_texts()][:2] == ['one', 'two']
        mine = Figure().subplots()
        assert plot(table, ax=mine) is mine
    heads = plot_attention_distance(table).collections
    assert close(sorted(d for o in heads for d in o.get_offsets()[:, 1]), sorted(d for o in table.heads_px for d in o))


def test_picture_of_cka():
    m = torch.rand(3, 2, generator=torch.Generator().manual_seed(0)); m[0, 0] = float('nan')
    ax = plot_cka(m, ('a', 'b'))
    shown = ax.images[0].get_array()
    assert shown.shape == (3, 2) and shown.mask[0, 0] and close(shown.data[1:], m[1:]) and ax.images[0].get_clim() == (0, 1)
    assert ax.get_xlabel() == 'block of b' and ax.get_ylabel() == 'block of a'


def panels(fig): return [o for o in fig.axes if o.get_label() != '<colorbar>']


def test_sheet(tmp_path):
    model, x = bootmae_model(), images()
    strong(model.teacher, 7)
    fig = analysis_sheet(model, x)
    shown = panels(fig)
    assert [(o.get_ylabel(), o.get_xlabel()) for o in shown[6:]] == [('block of ' + a, 'block of ' + b) for a,b in
                                                                     (('bootmae', 'its teacher'), ('bootmae', 'bootmae'), ('its teacher', 'its teacher'))]
    assert close(shown[6].images[0].get_array(), student_teacher(model, x)) and close(shown[7].images[0].get_array(), cka_matrix(model, model, x))
    fig.savefig(tmp_path/'sheet.png'); assert (tmp_path/'sheet.png').stat().st_size > 10_000 and fig._repr_png_().startswith(b'\x89PNG')
    both = panels(analysis_sheet(model, x, ('student', 'teacher')))
    assert both[6].get_xlabel() == 'block of teacher' and close(both[6].images[0].get_array(), student_teacher(model, x))
    assert len(panels(analysis_sheet(mae_model(), x))) == 7 and len(panels(analysis_sheet(encoder_only(model), x))) == 7
    assert len(panels(analysis_sheet(model.encoder, x, stats=(model.method.mean, model.method.std)))) == 7
    assert len(panels(analysis_sheet(mim_model('dbot', **tiny, **features, teacher_depth=0), x))) == 7
    assert len(panels(analysis_sheet(model, x, stats=False))) == 9


def test_sheet_of_five_models():
    models = {f'm{i}': timm_vit(depth=1 + i % 2) for i in range(5)}
    table = analyse(models, images())
    fig = analysis_sheet(models, images(), table=table)
    assert [o.get_xlabel() for o in panels(fig)[6:]] == [f'block of m{i}' for i in range(1, 5)]
    assert [o.get_text() for o in fig.subfigs[0].legends[0].get_texts()][:5] == list(models) and not any(o.get_legend() for o in panels(fig))
    assert close(panels(fig)[7].images[0].get_array(), cka_matrix(models['m0'], models['m2'], images()))


@pytest.mark.cuda
def test_on_a_gpu():
    model, x = bootmae_model(), images(9)
    want, pairs = analyse(model, x, which=('student', 'teacher')), student_teacher(model, x)
    model.cuda()
    got = analyse(model, x, which=('student', 'teacher'))
    for c in want.columns.drop(['model', 'heads_px']): np.testing.assert_allclose(got[c], want[c], rtol=1e-3, atol=1e-4)
    assert close(student_teacher(model, x), pairs, 1e-3)
    with torch.autocast('cuda', torch.bfloat16): analysis_sheet(model, x)
