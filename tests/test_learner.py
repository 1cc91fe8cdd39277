"""Training: it learns, repeats itself, accumulates exactly, and the teacher survives everything."""
import warnings

import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.transforms import ItemTransform
from fastai.learner import load_learner
from fastai.optimizer import SGD
from fastai.vision.data import ImageDataLoaders
from fastai.vision.augment import Resize

from common import equal, quietly, state
from bootmae_nb.checkpoints import CheckpointError, save_model
from bootmae_nb.data import SeededDL, mim_dls
from bootmae_nb.images import image_files, sample_photo, sample_photos
from bootmae_nb.learner import mim_learner
from bootmae_nb.losses import mim_loss, mim_targets
from bootmae_nb.masking import BlockMask, PatchMask, RandomMask, hide_highest
from bootmae_nb.models import encoder_only, methods, mim_model
from bootmae_nb.patches import patchify
from bootmae_nb.targets import ema_update, norm_feature, variance_over_images
from bootmae_nb.vit import zero_key_bias_grads
from bootmae_nb.viz import model_input, reconstruct

tiny = dict(arch='vit_tiny_patch16_224', width=48, depth=2, heads=3, patch_size=8, pixel_width=48)


def photos_learner(bs=8, seed=1, crops=8, img_size=32, **kw):
    dls = mim_dls(img_size=img_size, bs=bs, crops_per_image=crops, num_workers=0, seed=seed, device='cpu')
    return mim_learner(dls, **(tiny | kw))


class Stop(Callback):
    "Stop after `n` batches and remember their losses and masks"
    order = 90
    def __init__(self, n): self.n = n
    def before_fit(self): self.losses,self.masks = [], []
    def after_batch(self):
        if not self.training: return
        self.losses.append(self.loss.item()); self.masks.append(self.y.clone())
        if len(self.losses) == self.n: raise CancelFitException


# it learns

def test_overfits_eight_crops_by_measures_a_constant_cannot_pass():
    model = mim_model('bootmae', img_size=32, seed=0, **(tiny | dict(width=96, depth=3, pixel_width=96)))
    images = torch.cat([model_input(model, sample_photo(p.name)) for p in sample_photos()[:8]])
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3, betas=(.9, .95), weight_decay=.05)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, total_steps=500, cycle_momentum=False)
    g = torch.Generator().manual_seed(0)
    for _ in range(500):
        loss,_ = mim_loss(model, images, BlockMask()(8, model.grid, g))
        loss.backward(); zero_key_bias_grads(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step(); sched.step(); opt.zero_grad()
        ema_update(model.teacher, model.encoder, .99)
    model.eval()
    mask = BlockMask()(8, model.grid, torch.Generator().manual_seed(7))
    with torch.no_grad(): parts = mim_loss(model, images, mask, weight_map=False)[1]
    targets = mim_targets(model, images, mask, weight_map=False)
    zeros = targets['pixels'][0].square().mean()
    every = norm_feature(model.teacher_features(images))
    constant = (every - every.mean(0)).square().mean()          # the best constant per position, knowing these very targets
    variance = variance_over_images(targets['features'][0], mask)
    print(f"pixels {parts['pixels']/zeros:.3f} of zeros; features {parts['features']/constant:.3f} of the best constant; variance {variance:.3f}")
    assert parts['pixels'] < .35*zeros
    assert parts['features'] < .5*constant
    assert variance > .1


# it repeats itself

def test_same_seed_same_losses_and_another_seed_others():
    def losses(seed, **kw):
        learn = photos_learner(seed=seed, crops=16, cbs=Stop(20), **kw)
        quietly(learn, 'fit', 1); return learn.stop.losses
    first = losses(1)
    assert len(first) == 20
    torch.manual_seed(123)                      # the global state must not matter
    assert losses(1) == first
    assert losses(2) != first


def test_validation_masks_stay_and_training_masks_change():
    learn = photos_learner()
    valid = [learn.dls.valid.one_batch()[1] for _ in range(2)]
    assert torch.equal(*valid)
    masks = [[b[1] for b in learn.dls.train] for _ in range(2)]
    assert not any(torch.equal(a, b) for a,b in zip(*masks)) and not torch.equal(masks[0][0], masks[0][1])


# accumulation

class Numbered:
    "32 fixed images"
    def __len__(self): return 32
    def __getitem__(self, i): return (torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i)),)


class MaskFromImage(ItemTransform):
    "A mask that depends on the image alone, so that it is the same in any batch"
    order,_retain = 100, False
    def encodes(self, b):
        score = patchify(b[0], 8).mean(-1)
        return b[0], hide_highest(score, RandomMask().n_hidden(4)).as_subclass(PatchMask)


@pytest.mark.parametrize('opt_func', [None, SGD])
def test_accumulating_two_batches_of_eight_equals_one_of_sixteen(opt_func):
    def run(bs, *cbs):
        loader = lambda: SeededDL(Numbered(), bs=bs, num_workers=0)
        learn = mim_learner(DataLoaders(loader(), loader()), **tiny, seed=0, ema=.9, mask='random', weight_of_features=1., cbs=cbs)
        if opt_func: learn.opt_func = opt_func
        for dl in learn.dls.loaders: dl.after_batch.fs[-1] = MaskFromImage()
        quietly(learn, 'fit', 2, .1 if opt_func else 2e-4)        # AdamW divides by the gradient: where that is rounding noise, so is the step
        return learn.model
    one,two = run(16), run(8, GradientAccumulation(16))
    for (k,a),b in zip(one.state_dict().items(), two.state_dict().values()):
        if k.startswith('feature_'): continue                       # means over batches, for pictures: no part of training
        assert (a - b).abs().max() < 1e-5, f'{k}: {(a - b).abs().max():.1e}'
    assert not torch.equal(one.teacher.vit.norm.bias, one.encoder.vit.norm.bias)


# the teacher

def test_lr_find_leaves_the_teacher(tmp_path):
    learn = photos_learner(path=tmp_path)
    before = state(learn.model)
    quietly(learn, 'lr_find', num_it=6, show_plot=False, suggest_funcs=())
    assert equal(before, state(learn.model))


@pytest.mark.parametrize('ema,decay', [(None, .999), (.9, .9), ((.5, .7), .5)])
def test_one_step_moves_the_teacher_by_the_stated_decay(ema, decay):
    learn = photos_learner(ema=ema, cbs=Stop(1))
    before = [p.clone() for p in learn.model.encoder.parameters()]
    quietly(learn, 'fit', 1, .01)
    moved = 0
    for b,t,s in zip(before, learn.model.teacher.parameters(), learn.model.encoder.parameters()):
        assert torch.allclose(t, decay*b + (1 - decay)*s, atol=1e-7); moved += not torch.equal(b, t)
    assert moved > 10


def test_save_load_and_export_keep_the_teacher(tmp_path):
    learn = photos_learner(path=tmp_path, ema=.9)
    quietly(learn, 'fit_one_cycle', 1, 1e-3)
    saved = state(learn.model); learn.save('m')
    assert any(k.startswith('teacher.') for k in saved)
    quietly(learn, 'fit', 1, 1e-2); assert not equal(saved, state(learn.model))
    learn.load('m'); assert equal(saved, state(learn.model))
    learn.export('e.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); again = load_learner(tmp_path/'e.pkl')
    assert equal(saved, state(again.model)) and not again.model.teacher.training
    pic,mask,out = again.predict(sample_photo('coffee'))
    assert pic.size == (32, 32) and torch.equal(out['pixels'], learn.predict(sample_photo('coffee'))[2]['pixels'])


def test_the_teacher_stays_when_a_step_is_skipped():
    class Overflow(Callback):
        "What mixed precision does when gradients overflow"
        order = MixedPrecision.order
        def before_step(self): from fastai.callback.core import CancelStepException; raise CancelStepException
    learn = photos_learner(ema=.5, cbs=Overflow())
    learn.model.encoder.vit.norm.weight.data.mul_(2)        # so that moving would show
    before = state(learn.model.teacher)
    quietly(learn, 'fit', 1)
    assert equal(before, state(learn.model.teacher))


# shapes

@pytest.mark.parametrize('size,chans,patch,cls', [((96, 160), 3, 16, True), ((32, 48), 1, 8, True), ((32, 32), 4, 16, False), ((48, 32), 1, 16, False)])
def test_any_shape_trains_and_reconstructs(size, chans, patch, cls):
    dls = mim_dls(img_size=size, bs=4, crops_per_image=1, in_chans=chans, num_workers=0, device='cpu')
    learn = mim_learner(dls, **(tiny | dict(patch_size=patch)), class_token=cls, cbs=Stop(2))
    assert learn.model.encoder.n_prefix == cls and learn.model.in_chans == chans
    before = state(learn.model.encoder)
    quietly(learn, 'fit', 1, 1e-3)
    assert all(torch.isfinite(torch.tensor(learn.stop.losses))) and not equal(before, state(learn.model.encoder))
    pic = reconstruct(learn.model, sample_photo('astronaut'))
    assert pic.width > 4*128*size[1]/size[0] and pic.height >= 128
    assert learn.show_results().width > 0 and learn.show_batch().width > 0


# everything else that a Learner does

@pytest.mark.parametrize('method', ['bootmae', 'mae', 'dbot'])
def test_every_method_trains(method):
    learn = photos_learner(method=method, cbs=Stop(3), **(dict(feature_width=48, feature_heads=3, feature_depth=2) if method == 'dbot' else {}))
    teacher = None if learn.model.teacher is None else state(learn.model.teacher)
    quietly(learn, 'fit', 1, 1e-3)
    assert len(learn.stop.losses) == 3
    if method == 'dbot': assert equal(teacher, state(learn.model.teacher))
    names = [m.name for m in learn.metrics]
    assert names == dict(bootmae=['pixels', 'features', 'target_var'], mae=['pixels'], dbot=['features', 'target_var'])[method]


def test_metrics_are_those_of_the_validation_set():
    learn = photos_learner()
    loss,pixels,features,_ = quietly(learn, 'validate')
    learn.model.eval(); total = [0., 0., 0]
    for x,mask in learn.dls.valid:
        with torch.no_grad(): parts = mim_loss(learn.model, x, mask)[1]
        total = [total[0] + parts['pixels'].item()*len(x), total[1] + parts['features'].item()*len(x), total[2] + len(x)]
    assert abs(pixels - total[0]/total[2]) < 1e-5 and abs(features - total[1]/total[2]) < 1e-5 and abs(loss - pixels - features) < 1e-5


def test_get_preds_uses_the_masks_it_returns():
    learn = photos_learner()
    (pixels,_),masks = quietly(learn, 'get_preds')
    x = torch.cat([b[0].as_subclass(torch.Tensor) for b in learn.dls.valid])
    with torch.no_grad(): again = learn.model.eval()(x, masks.as_subclass(torch.Tensor))['pixels']
    assert torch.allclose(pixels, again, atol=1e-5)


def test_bf16_on_a_cpu_trains_and_leaves_nothing_switched_on():
    learn = photos_learner(precision='bf16', cbs=Stop(3))
    quietly(learn, 'fit', 1, 1e-3)
    assert len(learn.stop.losses) == 3 and not torch.is_autocast_enabled('cpu')
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in learn.model.parameters())

    class Fails(Callback):
        def after_pred(self): raise RuntimeError('in the middle')
    learn = photos_learner(precision='bf16', cbs=Fails())
    with pytest.raises(RuntimeError, match='in the middle'): quietly(learn, 'fit', 1)
    assert not torch.is_autocast_enabled('cpu')
    learn.remove_cb(Fails); quietly(learn, 'fit', 1)


def test_fp16_on_a_cpu_says_what_it_does():
    learn = photos_learner(cbs=Stop(1))
    with pytest.warns(UserWarning, match='fp16 needs a GPU'): learn.to_fp16()
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); quietly(learn, 'fit', 1)


def test_labelled_loaders_of_fastai_lose_their_labels(tmp_path):
    for i,p in enumerate(sample_photos()[:6]):
        folder = tmp_path/f'{"ab"[i % 2]}'; folder.mkdir(exist_ok=True)
        sample_photo(p.name).resize((64, 64)).save(folder/f'{p.name}.png')
    assert len(image_files(tmp_path)) == 6
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=.3, item_tfms=Resize(32), bs=2, num_workers=0, device='cpu')
    learn = mim_learner(dls, **tiny)
    x,mask = dls.one_batch()
    assert type(mask) is PatchMask and mask.shape == (2, 16) and x.min() < -.2
    quietly(learn, 'fit', 1)


def test_the_feature_weight_ramps_in_training_only():
    seen = []

    class Watch(Callback):
        order = 95
        def after_loss(self): seen.append((self.training, self.epoch, self.loss_func.feature_weight))
    quietly(photos_learner(cbs=Watch(), crops=1), 'fit', 8)
    assert {(e, w) for t,e,w in seen if t} == {(e, min(4*(e + 1)/8, 1)) for e in range(8)}
    assert {w for t,_,w in seen if not t} == {1.}


def test_pictures_are_written_for_each_epoch(tmp_path):
    learn = photos_learner(log_pictures=tmp_path, crops=1)
    quietly(learn, 'fit', 2)
    assert sorted(p.name for p in tmp_path.glob('*')) == ['epoch_0001.png', 'epoch_0002.png']


# errors before training

@pytest.mark.parametrize('kw,says', [
    (dict(img_size=36), 'image size 36 x 36 is not divisible by the patch size 8 x 8: use e.g.'),
    (dict(arch='vit_tini_patch16_224'), "arch 'vit_tini_patch16_224' is unknown to timm: did you mean vit_tiny_patch16_224"),
    (dict(arch='resnet50'), "arch 'resnet50' is not a plain vision transformer"),
    (dict(method='bootmea'), "method 'bootmea' is unknown: choose one of bootmae, mae, dbot"),
    (dict(mask_ratio=0), 'mask ratio 0 is outside'), (dict(mask_ratio=1.), 'mask ratio 1.0 is outside'),
    (dict(mask_ratio=.99), 'hides 16 of 16 patches'),
    (dict(in_chans=1), 'the model takes images of 1 channels and 32 x 32 pixels, but dls gives 3 channels and 32 x 32'),
    (dict(pixel_inject=5), 'block 5 does not exist'), (dict(ema=2.), 'EMA decay 2.0 is outside')])
def test_errors_say_what_was_wrong_and_what_to_do(kw, says):
    with pytest.raises(ValueError) as e: photos_learner(**kw)
    text = str(e.value)
    assert says in text and '\n' not in text


def test_a_grid_mask_by_its_name():
    assert photos_learner(mask='grid').model.method.masker.n_hidden((4, 4)) == 12


def test_a_made_model_keeps_its_mask():
    model, dls = mim_model('mae', img_size=32, seed=5, **(tiny | dict(pixel_depth=1, pixel_heads=3))), mim_dls(img_size=32, bs=4, num_workers=0)
    with pytest.raises(TypeError, match="mask='block' cannot be changed in a model that is made already"): mim_learner(dls, model, mask='block')
    own,other = model.method.name, next(o for o in methods if o != model.method.name)
    for method in (other, methods[other]):
        with pytest.raises(TypeError, match=f'the model is made already, for {own}, and cannot become one of {other}: leave method out'): mim_learner(dls, model, method)
    for method in (None, own, model.method): assert mim_learner(dls, model, method).model is model


@pytest.mark.cuda
def test_mixed_precision_on_a_gpu():
    for precision in ('bf16', 'fp16'):
        dls = mim_dls(img_size=32, bs=8, crops_per_image=8, num_workers=0, device='cuda')
        learn = mim_learner(dls, **tiny, precision=precision, cbs=Stop(5))
        seen = set()
        learn.model.teacher.vit.blocks[0].mlp.fc1.register_forward_hook(lambda m, i, o, seen=seen: seen.add(o.dtype))
        quietly(learn, 'fit', 1, 1e-3)
        assert seen == {torch.bfloat16 if precision == 'bf16' else torch.float16}
        assert all(p.isfinite().all() for p in learn.model.parameters())


# files

@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.cuda)])
def test_a_state_that_a_new_learner_loads_is_trained_on_where_the_loaders_are(device, tmp_path, monkeypatch):
    "fastai moves the model at the beginning of a fit: the optimiser's state would stay behind"
    made,moved = [photos_learner(path=tmp_path) for _ in range(2)], []
    for learn in made: learn.dls.to(device)
    quietly(made[0], 'fit', 1, 1e-3); made[0].save('good')
    monkeypatch.setattr(made[1].model, 'to', lambda d, real=made[1].model.to: (moved.append(str(d)), real(d))[1])
    made[1].load('good'); assert moved == [device]
    for learn in made: quietly(learn, 'fit', 1, 1e-3)
    assert {v.device.type for s in made[1].opt.opt.state.values() for v in s.values()} == {device}


@pytest.mark.parametrize('damage', ['cut', 'flipped', 'shape', 'renamed', 'hostile'])
def test_load_is_all_or_nothing(damage, tmp_path):
    "A damaged, misfitting or hostile file: one plain error that names it, and nothing changed in model and optimiser"
    learn = photos_learner(path=tmp_path)
    quietly(learn, 'fit', 1, 1e-3)
    good = learn.save('good')
    data, content = good.read_bytes(), torch.load(good, weights_only=False)
    bad = tmp_path/'models'/f'{damage}.pth'
    k = 'encoder.vit.blocks.0.attn.proj.weight'
    if damage == 'cut': bad.write_bytes(data[:len(data)//2])
    if damage == 'flipped': b = bytearray(data); b[len(b)//2] ^= 2; bad.write_bytes(b)
    if damage == 'shape': content['model'][k] = content['model'][k][:-1]; torch.save(content, bad)
    if damage == 'renamed': content['model'][k.replace('proj', 'out')] = content['model'].pop(k); torch.save(content, bad)
    if damage == 'hostile': torch.save(content | dict(opt=Hostile(tmp_path/'ran')), bad)
    other = photos_learner(path=tmp_path, seed=7)
    quietly(other, 'fit', 1, 1e-3)
    before, moments = state(other.model), {k: v.clone() for k,v in next(iter(other.opt.opt.state.values())).items()}
    with pytest.raises(CheckpointError, match=f'{damage}.pth') as e: other.load(damage)
    assert '\n' not in str(e.value) and not (tmp_path/'ran').exists()
    assert equal(before, state(other.model)) and equal(moments, next(iter(other.opt.opt.state.values())))
    assert equal(state(other.load('good').model), state(learn.model))


class Hostile:
    def __init__(self, file): self.file = file
    def __reduce__(self): return (type(self.file).touch, (self.file,))


# starting points

def test_weights_and_teacher_by_file(tmp_path):
    mae = mim_model('mae', img_size=32, seed=5, **(tiny | dict(pixel_depth=1, pixel_heads=3)))
    save_model(mae, tmp_path/'mae')
    learn = photos_learner(weights=tmp_path/'mae.safetensors')
    assert equal(state(learn.model.encoder), state(mae.encoder)) and equal(state(learn.model.teacher), state(mae.encoder))
    learn = photos_learner(method='dbot', teacher=tmp_path/'mae.safetensors', feature_width=32, feature_depth=1, feature_heads=2)
    assert learn.model.method.teacher == 'external' and learn.model.teacher.depth == 2
    quietly(learn, 'fit_one_cycle', 1, 1e-3)
    with pytest.raises(CheckpointError, match='nowhere.pth is not there'): photos_learner(teacher='nowhere.pth')
    with pytest.raises(ValueError, match='encoder only'): mim_learner(mim_dls(img_size=32, bs=4, num_workers=0), encoder_only(mae))


def test_random_numbers_of_a_step_follow_from_the_seed_alone():
    "Drop path: the same run twice, with the global generator in another state, and the state left as it was"
    ends = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        learn = photos_learner(drop_path=.5)
        quietly(learn, 'fit', 1, 1e-3)
        ends.append(state(learn.model))
    assert equal(*ends)
    assert not equal(ends[0], state(quietly_fitted(photos_learner(drop_path=0.)).model))


def quietly_fitted(learn): quietly(learn, 'fit', 1, 1e-3); return learn
