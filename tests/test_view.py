"""Views of one image: values that must hold, what is computed how often, pictures of any model, and a model left as it was."""
import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.decomposition import PCA
from torch import nn

from bootmae_nb.callbacks import ReconstructionLog
from bootmae_nb.data import mim_dls
from bootmae_nb.images import sample_photo, sample_photos
from bootmae_nb.learner import mim_learner
from bootmae_nb.losses import mim_loss
from bootmae_nb.masking import BlockMask, RandomMask
from bootmae_nb.models import encoder_only, mim_model, set_teacher
from bootmae_nb.patches import patchify, take
from bootmae_nb.targets import ema_update, feature_target, pixel_target
from bootmae_nb.vit import zero_key_bias_grads
from bootmae_nb.viz import (View, attention_maps, attention_sheet, contact_sheet, explanations, feature_mean, film_gif, film_strip, fit_image, mask_for, model_input,
                            nearest_patches, nearest_sheet, nested_masks, overlay, pca_basis, pca_rgb, pca_sheet, picture_grid, query_sheet, ratio_strip, reconstruct,
                            reconstruction_sheet, similarity_map, similarity_sheet)

tiny = dict(arch='vit_tiny_patch16_224', img_size=(32, 48), patch_size=8, width=48, depth=2, heads=3, pixel_width=48, seed=0)
small_decoders = dict(feature_width=48, feature_depth=1, feature_heads=3, pixel_depth=1, pixel_heads=3)
photo = sample_photo('coffee')


def tiny_model(method='bootmae', **kw):
    extra = {} if method == 'bootmae' else small_decoders
    return mim_model(method, **(tiny | extra | kw)).eval()


class Oracle(nn.Module):
    "In place of a decoder: gives what it was told, whatever the encoder says"
    def __init__(self, decoder, every):
        super().__init__()
        self.inject,self.with_cls,self.head,self.every = None, decoder.with_cls, decoder.head, every       # `every`: `(B, L, D)`, cls first if it is predicted

    def forward(self, x, visible, hidden, n_prefix=1, memory=None, all_tokens=False):
        cls = int(self.with_cls)
        if all_tokens: return self.every
        return torch.cat([self.every[:, :cls], take(self.every[:, cls:], hidden)], 1)


def know(model, image):
    "Make every decoder of a model say the truth about one image"
    x = model_input(model, image)
    for k in model.decoders:
        every = pixel_target(x, model.patch_size, model.method.norm_pixels) if k == 'pixels' else feature_target(model.teacher_features(x), model.method)
        model.decoders[k] = Oracle(model.decoders[k], every)
    return model


# values

blocks = dict(bootmae={}, dbot=dict(method='dbot'), token=dict(norm_features='token'), two=dict(feature_blocks=(0, 1)),
              averaged=dict(feature_blocks=(0, 1), feature_average=True), no_cls=dict(class_token=False), grey=dict(in_chans=1))


@pytest.mark.parametrize('name', blocks)
@pytest.mark.parametrize('centred', [True, False])
def test_the_teacher_is_like_itself(name, centred):
    view = View(know(tiny_model(**blocks[name]), photo), photo, seed=1)
    assert (view.similarity(centred) > 1 - 1e-5).all() and view.similarity().shape == (4, 6)
    L = view.mask.shape[1]
    for patch in (0, 5, L - 1):
        assert torch.allclose(view.query(patch, 'teacher', centred), view.query(patch, 'predicted', centred), atol=1e-5)
        assert view.query(patch)[divmod(patch, 6)] > 1 - 1e-5
    other = View(view.model, sample_photo('chelsea'))
    assert view.similarity(other=other).mean() < .9
    assert torch.allclose(view.pca('predicted')[:, view.mask.reshape(4, 6)], view.pca('teacher')[:, view.mask.reshape(4, 6)], atol=1e-4)


@pytest.mark.parametrize('norm', ['channel', 'patch', False])
@pytest.mark.parametrize('chans', [1, 3, 4])
def test_an_identity_model_returns_the_image(norm, chans):
    view = View(know(tiny_model(norm_pixels=norm, in_chans=chans), photo), photo, seed=2)
    parts = view.parts()
    assert list(parts) == ['image', 'masked input', 'prediction', 'pasted in']
    off = np.abs(np.asarray(parts['pasted in']).astype(int) - np.asarray(view.picture))
    assert off.max() <= 1 and view.error().max() < 1/255
    hidden = np.kron(view.mask.reshape(4, 6), np.ones((8, 8))).astype(bool)
    assert np.abs(np.asarray(parts['prediction']).astype(int) - np.asarray(view.picture))[hidden].max() <= 1
    seen = np.asarray(parts['masked input'])
    assert (seen[~hidden] == np.asarray(view.picture)[~hidden]).all() and len(np.unique(seen[hidden])) == 1
    assert reconstruct(view.model, photo).size == reconstruct(view.model, photo, seed=5).size


@pytest.mark.parametrize('method,same', [('bootmae', True), ('dbot', False)])
def test_a_prediction_is_normalised_as_in_the_loss(method, same):
    view = View(know(tiny_model(method), photo), photo)
    view.model.decoders['features'].every = 7*view.model.decoders['features'].every + 1
    assert torch.allclose(view.predicted(False), view.target(False), atol=1e-3) == same


def test_an_untrained_prediction_is_unrelated_to_the_centred_target():
    """An untrained predictor says nearly the same of every image, and the centred targets of the photographs that the mean was taken over add up to zero at each place:
    so the inner products add up to zero, and the cosines do but for the targets' different lengths (about 10 %) and what the predictor does tell apart."""
    model = tiny_model()
    mask = mask_for(model, None, 1, 3)
    views = [View(model, sample_photo(p.name), mask) for p in sample_photos()]
    centred = torch.stack([v.similarity() for v in views])[:, mask.reshape(4, 6)]
    raw = torch.stack([v.similarity(False) for v in views])[:, mask.reshape(4, 6)]
    print(f'centred {centred.mean():.3f}, raw {raw.mean():.3f}')
    assert centred.mean().abs() < .1
    assert torch.stack([v.target() for v in views]).mean(0).abs().max() < 1e-5


def test_training_makes_the_prediction_like_the_target_of_its_own_image():
    model = mim_model('bootmae', 'vit_tiny_patch16_224', img_size=48, patch_size=8, width=96, depth=3, heads=3, pixel_width=48, seed=0)
    images = torch.cat([model_input(model, sample_photo(p.name)) for p in sample_photos()[:8]])
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3, betas=(.9, .95), weight_decay=.05)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, total_steps=100, cycle_momentum=False)
    g = torch.Generator().manual_seed(0)
    for _ in range(100):
        loss,_ = mim_loss(model, images, BlockMask()(8, model.grid, g))
        loss.backward(); zero_key_bias_grads(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step(); sched.step(); opt.zero_grad()
        ema_update(model.teacher, model.encoder, .99)
    views = [View(model, sample_photo(p.name), seed=100 + i) for i,p in enumerate(sample_photos()[:8])]
    own = torch.tensor([v.mean_hidden(v.similarity()) for v in views])
    others = torch.tensor([[v.mean_hidden(v.similarity(other=o)) for o in views if o is not v] for v in views]).mean(1)
    print(f'own {own.mean():.2f}, others {others.mean():.2f}, least difference {(own - others).min():.2f}')
    assert (own - others).min() > .3 and own.mean() - others.mean() > .5
    assert own.mean() > .5


def test_the_mean_of_each_place_comes_from_training_or_from_the_packaged_photographs():
    model = tiny_model()
    assert not model.feature_count.any()
    x = torch.cat([model_input(model, sample_photo(p.name)) for p in sample_photos()])
    mean = feature_target(model.teacher_features(x), model.method).mean(0)
    assert torch.allclose(feature_mean(model), mean, atol=1e-5) and model.feature_count.all()
    view = View(model, photo)
    assert torch.allclose(view.target(False) - view.target(), mean, atol=1e-5) and torch.allclose(view.predicted(False) - view.predicted(), mean, atol=1e-5)
    model.feature_mean.fill_(.25); model.feature_count.fill_(9)                     # as training keeps it
    assert torch.equal(feature_mean(model), torch.full_like(mean, .25))
    assert feature_mean(tiny_model('dbot')).shape == (24, 48)                        # without the class token


# attention

def timm_vit(**kw): return timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0, **kw).eval()


vits = dict(plain={}, qk_norm=dict(qk_norm=True), no_bias=dict(qkv_bias=False), no_cls=dict(class_token=False, global_pool='avg'), registers=dict(reg_tokens=3))


@pytest.mark.parametrize('name', vits)
@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('block', [0, -1])
def test_weights_times_values_are_the_output_of_the_block(name, fused, block):
    torch.manual_seed(0)
    vit = timm_vit(**vits[name])
    attn = vit.blocks[block].attn; attn.fused_attn = fused
    if attn.qkv.bias is not None: nn.init.normal_(attn.qkv.bias)
    nn.init.normal_(attn.qkv.weight, std=.3)                                         # far from even attention
    if name == 'qk_norm': nn.init.normal_(attn.q_norm.weight); nn.init.normal_(attn.k_norm.bias)
    x,io = torch.randn(1, 3, 32, 32), []
    handle = attn.register_forward_hook(lambda m, args, out: io.extend([args[0], out]))
    with torch.no_grad(): vit.forward_features(x)
    handle.remove()
    w = attention_maps(vit, x, block)
    N = 16 + vit.num_prefix_tokens
    assert w.shape == (3, N, N) and (w.sum(-1) - 1).abs().max() < 1e-5 and w.std() > .02
    v = attn.qkv(io[0]).reshape(N, 3, 3, 16)[:, 2].transpose(0, 1)
    assert (attn.proj((w @ v).transpose(0, 1).reshape(N, 48)) - io[1][0]).abs().max() < 1e-5
    assert torch.equal(attention_maps(vit, x[0], block), w) and not attn._forward_pre_hooks
    with pytest.raises(ValueError, match='one image at a time, and there are 2'): attention_maps(vit, torch.cat([x, x]))


def test_attention_of_a_model_in_training_is_that_in_eval():
    vit,x = timm_vit(drop_path_rate=.9, proj_drop_rate=.5), torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    w = attention_maps(vit, x); vit.train()
    assert torch.equal(attention_maps(vit, x), w) and vit.training and vit.blocks[0].training and not w.requires_grad


def test_attention_of_a_view():
    view = View(tiny_model(), photo)
    w = attention_maps(view.model, view.x, 0)
    assert torch.allclose(view.attention(0, 1, 'cls'), w[1, 0, 1:].reshape(4, 6)) and torch.allclose(view.attention(0, query=5), w[:, 6, 1:].mean(0).reshape(4, 6))
    assert torch.equal(view.attention(-2), view.attention(0))
    bare = View(tiny_model(class_token=False), photo)
    assert torch.allclose(bare.attention(query=5), attention_maps(bare.model, bare.x)[:, 5].mean(0).reshape(4, 6))
    for f,says in [(lambda: bare.attention(), 'no class token to ask for: give a patch, query=0 to 23'), (lambda: view.attention(2), 'block 2 does not exist'),
                   (lambda: view.attention(head=3), 'head 3 does not exist'), (lambda: view.attention(query=24), "query=24 is no token: give 'cls' or a patch, 0 to 23"),
                   (lambda: view.attention(query='mean'), "query='mean' is no token"), (lambda: attention_sheet(bare), 'no class token')]:
        with pytest.raises(ValueError, match=says): f()


def test_attention_computed_in_another_way_is_refused():
    beit = timm.create_model('beit_base_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=0)
    with pytest.raises(ValueError, match='attention of a Beit is computed in another way'): attention_maps(beit, torch.randn(1, 3, 32, 32))
    assert beit.training and not beit.blocks[0].attn._forward_pre_hooks


# nearest patches

@pytest.mark.parametrize('by', ['teacher', 'encoder'])
@pytest.mark.parametrize('centred', [True, False])
def test_nearest_patches_are_those_of_a_plain_search(by, centred):
    model = tiny_model(); names = 'coffee', 'chelsea', 'rocket'
    views = [View(model, sample_photo(n)) for n in names]
    feats = torch.stack([v.target(centred) if by == 'teacher' else v.encoded(centred=centred) for v in views]).reshape(72, -1)
    scores = [(F.cosine_similarity(feats[30], feats[i], dim=0).item(), i//24, i % 24) for i in range(72) if i != 30]
    found = nearest_patches(model, [sample_photo(n) for n in names], 1, 6, 5, centred, by)
    assert [o[:2] for o in found] == [o[1:] for o in sorted(scores, reverse=True)[:5]]
    assert all(abs(a[2] - b[0]) < 1e-5 for a,b in zip(found, sorted(scores, reverse=True)))
    assert nearest_patches(model, views, 1, 6, 5, centred, by) == found
    few = nearest_patches(model, views, 1, 6, 9, centred, by, per_image=2)
    assert sorted(o[0] for o in few) == [0, 0, 1, 1, 2, 2] and len(nearest_patches(model, views, 1, 6, 999)) == 71


def test_the_same_image_twice_finds_itself_first():
    model = tiny_model()
    assert nearest_patches(model, [photo, sample_photo('rocket'), photo], 0, 8)[0][:2] == (2, 8)
    for args,says in [((3, 0), 'image 3 does not exist: there are 1'), ((0, 24), 'patch 24 does not exist'), ((0, -1), 'patch -1 does not exist')]:
        with pytest.raises(ValueError, match=says): nearest_patches(model, [photo], *args)
    with pytest.raises(ValueError, match="by='student' is unknown"): nearest_patches(model, [photo], 0, 0, by='student')
    with pytest.raises(ValueError, match='needs a model with a feature decoder'): nearest_patches(tiny_model('mae'), [photo], 0, 0, by='teacher')


# strips and films

def test_masks_of_a_strip_are_nested():
    ratios = .9, .25, .5, .75
    masks = nested_masks((4, 6), ratios, seed=3)
    assert [int(m.sum()) for m in masks] == [22, 6, 12, 18]
    by_size = sorted(masks, key=lambda m: m.sum())
    assert all((b | ~a).all() for a,b in zip(by_size, by_size[1:]))
    assert torch.equal(masks, nested_masks((4, 6), ratios, 3)) and not torch.equal(masks, nested_masks((4, 6), ratios, 4))
    with pytest.raises(ValueError, match='outside'): nested_masks((4, 6), (.5, 1.))


def test_a_ratio_strip_shows_each_ratio():
    strip = ratio_strip(tiny_model(), photo, (.25, .5, .9), height=64)
    assert strip.mode == 'RGB' and strip.height == 22 + 6 + 2*70
    with pytest.raises(ValueError, match='this dbot model predicts features: this picture needs a model with a pixel decoder'): ratio_strip(tiny_model('dbot'), photo)


@pytest.fixture(scope='module')
def log(tmp_path_factory):
    "A folder as a run writes it: three images, five epochs"
    folder = tmp_path_factory.mktemp('run')/'reconstructions'
    dls = mim_dls(img_size=32, bs=4, crops_per_image=1, num_workers=0, device='cpu', seed=1, valid_pct=.4)
    learn = mim_learner(dls, **{k: v for k,v in tiny.items() if k not in ('img_size', 'seed')}, cbs=ReconstructionLog(folder, n=3, show=False))
    with learn.no_bar(), learn.no_logging(): learn.fit(5, 1e-3)
    return folder, reconstruction_sheet(learn.model.eval(), *(o.as_subclass(torch.Tensor)[:3] for o in dls.valid.one_batch()))


def test_a_film_strip_cuts_the_log_of_a_real_run(log):
    folder,last = log
    strip = film_strip(folder, n=3, row=2)
    assert strip.mode == 'RGB' and strip.size == (5*128 + 6*8, 21 + 128 + 8)
    cell = lambda i: np.asarray(strip)[21:149, 8 + i*136:136 + i*136]
    sheet = np.asarray(last); at = lambda r, c, w=128: sheet[28 + r*134:156 + r*134, 6 + c*134:134 + c*134]
    assert sheet.shape[1] == 4*128 + 5*6 and np.array_equal(np.asarray(Image.open(folder/'epoch_0005.png').convert('RGB')), sheet)
    assert np.array_equal(cell(0), at(2, 0)) and np.array_equal(cell(1), at(2, 1)) and np.array_equal(cell(4), at(2, 3))
    assert not np.array_equal(cell(2), cell(4))
    assert film_strip([Image.open(p) for p in sorted(folder.glob('*.png'))], n=3, row=2, column='prediction').size[0] >= strip.width
    assert film_strip(folder, n=99).width == 7*128 + 8*8


@pytest.mark.parametrize('size,n', [((32, 80), 1), ((48, 32), 4), ((32, 32), 2), ((128, 32), 3)])
def test_sheets_of_any_shape_are_cut_where_they_were_joined(size, n):
    model = tiny_model(img_size=size)
    x = torch.cat([model_input(model, sample_photo(p.name)) for p in sample_photos()[:n]])
    sheet = reconstruction_sheet(model, x, mask_for(model, None, n))
    w = round(128*size[1]/size[0])
    for row in range(n):
        strip = film_strip([sheet], row=row)
        assert strip.height == 21 + 128 + 8
        want = View(model, sample_photo(sample_photos()[row].name)).picture.resize((w, 128), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(strip)[21:149, 8:8 + w], np.asarray(want))
    with pytest.raises(ValueError, match=f'row {n} does not exist: picture 1 has {n} images'): film_strip([sheet], row=n)


def test_a_gif_is_whole_or_not_there(log, tmp_path):
    folder,last = log
    file = film_gif(folder, tmp_path/'film.gif', ms=100)
    with Image.open(file) as im:
        times = []
        for i in range(im.n_frames): im.seek(i); times.append(im.info['duration'])
        assert times == [100]*4 + [500] and im.size == (last.width, last.height + 30) and im.info['loop'] == 0
        off = np.abs(np.asarray(im.convert('RGB')).astype(int)[:last.height] - np.asarray(last))
        assert off.mean() < 6
    assert Image.open(film_gif(folder, tmp_path/'short.gif', n=2)).n_frames == 2
    before = file.read_bytes()
    bad = [Image.open(folder/'epoch_0001.png'), Image.new('RGB', (50, 60))]
    with pytest.raises(ValueError, match='picture 2 is a picture of 50 x 60 pixels'): film_gif(bad, file)
    (tmp_path/'log').mkdir(); (tmp_path/'log'/'epoch_0001.png').write_bytes((folder/'epoch_0001.png').read_bytes()[:500])
    with pytest.raises(ValueError, match='epoch_0001.png'): film_gif(tmp_path/'log', file)
    assert file.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ['film.gif', 'log', 'short.gif']


def test_a_disk_that_fills_up_leaves_the_old_gif(log, tmp_path, monkeypatch):
    file = film_gif(log[0], tmp_path/'film.gif', n=2); before = file.read_bytes()
    def fails(self, p, **kw): open(p, 'wb').write(b'GIF89a'); raise OSError('no space left on device')
    monkeypatch.setattr(Image.Image, 'save', fails)
    with pytest.raises(OSError, match='no space'): film_gif(log[0], file)
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['film.gif']


def test_what_is_no_log(tmp_path):
    for f,says in [(lambda: film_strip(tmp_path), 'holds no epoch_0001.png'), (lambda: film_strip([]), 'there are no pictures'),
                   (lambda: film_strip([Image.new('RGB', (300, 200))]), 'picture 1 is no sheet of a reconstruction log'),
                   (lambda: film_strip([photo], n=0), 'n=0 pictures shows nothing'), (lambda: film_strip([photo], column='image'), "choose 'prediction' or 'pasted in'"),
                   (lambda: film_gif([photo], tmp_path/'a.gif', ms=1), 'ms=1 is too short')]:
        with pytest.raises(ValueError, match=says): f()
    assert not list(tmp_path.iterdir())


# pictures of any model

def external():
    teacher = timm.create_model('vit_tiny_patch16_224', img_size=(64, 96), patch_size=16, embed_dim=36, depth=3, num_heads=3, num_classes=0)
    return set_teacher(tiny_model(feature_blocks=(-1,)), teacher).eval()


makers = {'grey': lambda: tiny_model(in_chans=1), 'four channels': lambda: tiny_model(in_chans=4), 'tall': lambda: tiny_model(img_size=(64, 32)),
          'dbot': lambda: tiny_model('dbot'), 'dbot without cls': lambda: tiny_model('dbot', class_token=False), 'external teacher': external,
          'two blocks': lambda: tiny_model(feature_blocks=(0, 1)), 'averaged': lambda: tiny_model(feature_blocks=(0, 1), feature_average=True),
          'registers': lambda: tiny_model(arch='vit_small_patch14_reg4_dinov2'), 'raw pixels': lambda: tiny_model(norm_pixels=False)}


@pytest.mark.parametrize('name', makers)
def test_pictures_are_rgb_of_the_stated_size(name):
    model = makers[name](); view = View(model, photo, seed=1)
    (rows,cols),(h,w) = model.grid, model.img_size
    W = round(w*96/h)
    assert view.picture.mode == view.masked().mode == 'RGB' and view.picture.size == view.masked().size == (w, h)
    for which in ('teacher', 'predicted', 'encoder'):
        rgb = view.pca(which)
        assert rgb.shape == (3, rows, cols) and rgb.min() >= 0 and rgb.max() <= 1
        assert view.pca_picture(which, 96).size == (W, 96) and view.pca_picture(which).mode == 'RGB'
    seen = ~view.mask.reshape(rows, cols)
    assert torch.allclose(view.pca('predicted')[:, seen], .75 + .25*view.pca('teacher')[:, seen])
    maps = [view.similarity(), view.query(3), view.query(3, 'predicted'), view.weights(), view.attention(query=2)] + ([view.error()] if view.has_pixels else [])
    for m in maps:
        assert m.shape == (rows, cols) and m.isfinite().all()
        assert overlay(view.picture, m, height=96, legend=False).size == (W, 96)
        with_scale = overlay(view.picture, m, -1, 1, height=96, label='cosine')
        assert with_scale.mode == 'RGB' and with_scale.size == (W + 54, 96)
    sheets = [similarity_sheet(view, height=96), query_sheet(view, 3, height=96), pca_sheet(view, height=96), attention_sheet(view, query=2, height=96),
              nearest_sheet(model, [view, sample_photo('chelsea')], 0, 5)]
    if view.has_pixels: sheets.append(ratio_strip(model, photo, (.5, .75)))
    assert all(o.mode == 'RGB' for o in sheets)
    assert sheets[0].height == 21 + 96 + 8 and sheets[1].height == 2*21 + 96 + 8 and sheets[0].width >= 3*W + 54 + 4*8


def texts_of(monkeypatch, f):
    "What a picture has written on it"
    from PIL import ImageDraw
    seen,draw = [], ImageDraw.ImageDraw.text
    with monkeypatch.context() as m:
        m.setattr(ImageDraw.ImageDraw, 'text', lambda self, xy, text, *args, **kw: (seen.append(text), draw(self, xy, text, *args, **kw))[1])
        f()
    return ' | '.join(seen)


def test_captions_hold_the_numbers_and_say_what_is_visible(monkeypatch):
    view = View(tiny_model(), photo, seed=1); sim = view.similarity()
    hidden,seen = (int(o[0]) for o in ((view.mask[0]).nonzero()[4], (~view.mask[0]).nonzero()[1]))
    assert f'similarity, mean {sim[view.mask.reshape(4, 6)].mean():.2f}' in texts_of(monkeypatch, lambda: similarity_sheet(view))
    text = texts_of(monkeypatch, lambda: query_sheet(view, hidden))
    assert f'patch {hidden} (row {hidden//6}, column {hidden % 6}), hidden' in text and f'({view.query(hidden, "predicted").flatten()[hidden]:.2f} to the' in text
    assert f'patch {seen} (row {seen//6}, column {seen % 6}), visible: no prediction is trained here' in texts_of(monkeypatch, lambda: query_sheet(view, seen))
    assert 'nothing is hidden' in texts_of(monkeypatch, lambda: similarity_sheet(view.with_mask(torch.zeros(24))))
    err = view.mean_hidden(view.error().square())**.5
    assert texts_of(monkeypatch, lambda: ratio_strip(view.model, photo, (.5,))).startswith('50% hidden, error 0.')
    assert err == pytest.approx(np.sqrt(np.square(view.error()[view.mask.reshape(4, 6)].numpy()).mean()), rel=1e-5)


def test_nothing_and_everything_hidden():
    for share in (0, 1):
        view = View(tiny_model(), photo, torch.full((24,), share))
        assert view.error().shape == view.similarity().shape == (4, 6) and view.similarity().isfinite().all()
        assert similarity_sheet(view).mode == query_sheet(view, 0).mode == pca_sheet(view).mode == 'RGB'
    assert np.array_equal(View(tiny_model(), photo, torch.zeros(24)).parts()['pasted in'], view.picture)


def test_an_image_fits_whatever_rounding_does():
    "Dividing by the scale may give a little more than the image has"
    for w in range(50, 700, 7):
        for size in [(48, 72), (49, 33), (224, 224)]: assert fit_image(Image.new('L', (w, 300)), size).size == size[::-1]


# overlay

def test_the_scale_says_what_is_beyond_it_and_leaves_the_map_in_place(monkeypatch):
    m = torch.linspace(0, 1, 24).reshape(4, 6)
    text = lambda **kw: texts_of(monkeypatch, lambda: overlay(photo, m, height=224, **kw))
    assert text(label='cosine') == 'cosine | 1 | 0.5 | 0' and text(high=.5).startswith('> 0.5') and text(low=.1).endswith('< 0.1')
    assert text(high=.5, only=m < .4).startswith('0.5')                                         # patches that are not drawn do not count
    assert texts_of(monkeypatch, lambda: overlay(photo, m, height=48)) == '1 | 0'               # no room for three
    a,b = overlay(photo, m, height=96, legend=False), overlay(photo, m, height=96, label='a long label')
    assert np.array_equal(a, b.crop((0, 0, *a.size))) and b.width > a.width + 54


def test_all_colours_are_the_maps():
    red = Image.new('RGB', (48, 32), 'red')
    flat = np.asarray(overlay(red, torch.zeros(4, 6), -1, 1, legend=False)).astype(int)
    assert np.abs(flat - flat[..., :1]).max() <= 4                                              # zero is white
    assert np.ptp(np.asarray(overlay(red, torch.zeros(4, 6), -1, 1, legend=False, grey=False))[0, 0].astype(int)) > 30
    grid = np.asarray(overlay(red, torch.eye(2), height=64, legend=False, opacity=1.))
    assert (grid[:32, -1] != grid[-1, -1]).any() and len(np.unique(grid.reshape(-1, 3), axis=0)) == 2


def test_a_grid_holds_every_picture_under_its_caption():
    pics = {str(i): Image.new('RGB', (20 + i, 30), (10*i, 0, 255)) for i in range(5)}
    sheet = np.asarray(picture_grid(pics, 2, 'five'))
    assert all((sheet == (10*i, 0, 255)).all(2).sum() == (20 + i)*30 for i in range(5)) and picture_grid(pics).height == 21 + 30 + 8


def test_colours_of_features_wider_than_there_are_patches_are_those_of_scikit_learn():
    x = torch.randn(1, 12, 60, generator=torch.Generator().manual_seed(0))*torch.linspace(3, .1, 60)
    basis = pca_basis(x); theirs = PCA(3).fit(x[0].double().numpy())
    assert np.allclose(basis.share, theirs.explained_variance_ratio_) and np.allclose((basis.axes.T.numpy()*theirs.components_).sum(1)**2, 1)
    assert (pca_rgb(torch.ones(1, 6, 60), (2, 3)) == .5).all() and (pca_rgb(x[:, :2], (1, 2))[:, 1:] == .5).all()


# once

def counted(model):
    "Count calls of each part"
    counts = dict.fromkeys(['encoder', 'teacher', *model.decoders], 0)
    def count(name): return lambda *args: counts.__setitem__(name, counts[name] + 1)
    for name,m in [('encoder', model.encoder), ('teacher', model.teacher), *model.decoders.items()]: m.register_forward_hook(count(name))
    return counts


def test_each_thing_is_computed_once_and_a_new_mask_computes_only_what_depends_on_it():
    model = tiny_model(); feature_mean(model)
    counts = counted(model); view = View(model, photo)
    assert not any(counts.values())                                                             # nothing before it is asked for
    def look(v):
        v.parts(); v.masked(); v.error(); v.weights(); v.similarity(); v.similarity(False); v.query(3); v.query(5, 'predicted'); v.pca('teacher'); v.pca('predicted')
        similarity_sheet(v); query_sheet(v, 2)
    look(view); look(view)
    assert counts == dict(encoder=1, teacher=1, pixels=1, features=1)
    other = view.with_mask(RandomMask(.5)); look(other)
    assert counts == dict(encoder=2, teacher=1, pixels=2, features=2)
    for v in (view, other): v.pca('encoder'); pca_sheet(v); [v.attention(0, i, q) for i in (None, 0, 2) for q in ('cls', 4)]; attention_sheet(v, 0)
    assert counts == dict(encoder=4, teacher=1, pixels=2, features=2)                           # one for features, one for attention
    other.attention(1); view.attention(1); assert counts['encoder'] == 5
    nearest_patches(model, [view, other], 0, 3); assert counts['teacher'] == 1


@pytest.mark.parametrize('training', [True, False])
def test_the_model_is_left_alone(training):
    model = mim_model('bootmae', **tiny, drop_path=.5).train(training); feature_mean(model)
    before,grads = {k: v.clone() for k,v in model.state_dict().items()}, {k: p.requires_grad for k,p in model.named_parameters()}
    state = torch.get_rng_state()
    def look():
        view = View(model, photo)
        return [*view.parts().values(), similarity_sheet(view), query_sheet(view, 2), pca_sheet(view), attention_sheet(view), ratio_strip(model, photo, (.5,)),
                nearest_sheet(model, [photo], 0, 2), nearest_sheet(model, [photo], 0, 2, by='encoder')]
    first = look()
    assert model.training == model.encoder.training == training and not model.teacher.training
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items()) and torch.equal(state, torch.get_rng_state())
    assert {k: p.requires_grad for k,p in model.named_parameters()} == grads and all(p.grad is None for p in model.parameters())
    view = View(model, photo)
    assert not any(t.requires_grad for t in (view.similarity(), view.target(), view.predicted(), view.pca('encoder'), view.attention(), view.encoded()))
    assert all(np.array_equal(a, b) for a,b in zip(first, look()))                              # nothing random, no drop path
    model.train(); out = model(view.x, view.mask)['pixels'].sum(); out.backward()
    assert model.encoder.vit.blocks[0].attn.qkv.weight.grad.abs().max() > 0


# what a model cannot show

def test_models_without_a_part_say_so():
    mae,dbot,alone = (View(m, photo) for m in (tiny_model('mae'), tiny_model('dbot'), encoder_only(tiny_model())))
    lost = View(copy.deepcopy(tiny_model(teacher=timm_teacher())), photo); lost.model.teacher = None
    features = [lambda v: v.similarity(), lambda v: v.query(0), lambda v: v.target(), lambda v: v.pca(), lambda v: v.pca('predicted'), similarity_sheet,
                lambda v: query_sheet(v, 0)]
    pixels = [lambda v: v.parts(), lambda v: v.error()]
    for view,fs,says in [(mae, features, 'this mae model predicts pixels: this picture needs a model with a feature decoder and a teacher'),
                         (dbot, pixels, 'this dbot model predicts features: this picture needs a model with a pixel decoder'),
                         (alone, features + pixels, 'this bootmae model predicts nothing: this picture needs a model with'),
                         (lost, features, 'this picture needs a model with a feature decoder and a teacher')]:
        for f in fs:
            with pytest.raises(ValueError, match=says): f(view)
    for view in (mae, dbot, alone, lost):                                                       # what every model can show
        assert view.masked().mode == 'RGB' and view.pca('encoder').shape == (3, 4, 6) and view.attention().shape == (4, 6)
        assert pca_sheet(view).mode == attention_sheet(view).mode == nearest_sheet(view.model, [view, view], 0, 3, by='encoder').mode == 'RGB'
    assert nearest_patches(mae.model, [mae, mae], 0, 3)[0][:2] == (1, 3)
    with pytest.raises(ValueError, match='needs a model with a feature decoder and a teacher'): similarity_map(mae.model, photo)


def timm_teacher(): return timm.create_model('vit_tiny_patch16_224', img_size=(32, 48), patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=0)


def test_explanations_are_two_or_three_plain_sentences():
    assert set(explanations) == {'masked input', 'prediction', 'pasted in', 'error', 'loss weight', 'similarity', 'patch query', 'PCA colours', 'attention',
                                 'nearest patches', 'ratio strip'}
    for text in explanations.values():
        assert 2 <= text.count('. ') + 1 <= 4 and text.endswith('.') and '  ' not in text and '\u2014' not in text


@pytest.mark.parametrize('shape', [(2, 3), (1, 6)])
def test_contact_sheets_hold_their_pictures(shape):
    ims = [[Image.new('RGB', (40, 20), (r*9, c*9, 200)) for c in range(shape[1])] for r in range(shape[0])]
    sheet = np.asarray(contact_sheet(ims, [str(i) for i in range(shape[1])], 20))
    assert all((sheet == (r*9, c*9, 200)).all(2).sum() == 800 for r in range(shape[0]) for c in range(shape[1]))


def test_error_is_a_root_mean_square_on_the_scale_of_the_pixels():
    view = View(tiny_model(), photo, seed=1)
    diff = patchify(torch.from_numpy(np.asarray(view.parts()['pasted in']).astype('float32') - np.asarray(view.picture)).permute(2, 0, 1)[None]/255, 8)[0]
    hidden = view.mask[0]
    assert torch.allclose(view.error().flatten()[hidden], diff.square().mean(-1).sqrt()[hidden], atol=.05) and not view.error().flatten()[~hidden].any()
