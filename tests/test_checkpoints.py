"""Weights in and out: every key of the authors' layouts, files that are damaged or hostile, teachers of other kinds, timm."""
import argparse
import copy
import json
import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch.utils._python_dispatch import TorchDispatchMode

from bootmae_nb.checkpoints import (CheckpointError, authors_to_ours, from_authors, from_timm, guess_layout, load_model, load_teacher, load_weights, misfit, read_file,
                                    save_model, to_authors, to_timm)
from bootmae_nb.losses import mim_loss
from bootmae_nb.masking import RandomMask
from bootmae_nb.models import encoder_only, methods, mim_model, next_stage, set_teacher
from bootmae_nb.vit import make_encoder

small = dict(arch='vit_tiny_patch16_224', img_size=32, patch_size=8, width=48, depth=2, heads=4)
narrow = dict(bootmae=dict(pixel_width=32), mae=dict(pixel_width=32, pixel_depth=2, pixel_heads=4), dbot=dict(feature_width=32, feature_depth=2, feature_heads=4))


def made(name, **kw): return mim_model(name, **small | narrow[name] | dict(seed=0) | kw).eval()
def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())


# every key of the published sizes

published = [(name, size) for name in methods for size in ('base', 'large', 'huge') if (name, size) != ('bootmae', 'huge')]


@pytest.mark.parametrize('name,size', published)
def test_every_key_of_the_published_models_both_ways(reference, name, size):
    "Each name of theirs has a place in our model and each tensor of ours comes from one of theirs; going back gives their names and shapes exactly"
    shapes = json.loads((reference/f'{name}_{size}_keys.json').read_text())
    with torch.device('meta'):
        theirs = {k: torch.empty(v) for k,v in shapes.items()}
        model = from_authors(theirs, name)
        back = to_authors(model)
    assert {k: list(v.shape) for k,v in back.items()} == shapes
    assert set(model.report.loaded) == set(shapes) and not model.report.ignored
    ours = {k: v.shape for k,v in model.state_dict().items() if k.startswith(('encoder.', 'decoders.'))}
    assert {k: v.shape for k,v in authors_to_ours(theirs, name).items()} == ours
    vit = model.encoder.vit
    assert (vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads) == {'base': (768, 12, 12), 'large': (1024, 24, 16), 'huge': (1280, 32, 16)}[size]


def test_values_of_the_published_base_models_both_ways(reference):
    "The same with numbers: a file of random tensors comes back bit for bit"
    shapes = json.loads((reference/'bootmae_base_keys.json').read_text())
    theirs = {k: torch.randn(v) for k,v in shapes.items()}
    model = from_authors(dict(model=theirs, model_ema={k: v + 1 for k,v in theirs.items()}), 'bootmae')
    assert same(to_authors(model), theirs)
    assert torch.equal(model.teacher.vit.cls_token, theirs['cls_token'] + 1) and torch.equal(model.encoder.vit.cls_token, theirs['cls_token'])
    ema = from_authors(dict(model=theirs, model_ema={k: v + 1 for k,v in theirs.items()}), 'bootmae', ema=True)
    assert torch.equal(ema.decoders['pixels'].mask_token, theirs['mask_token'] + 1)


@pytest.mark.parametrize('name', list(methods))
def test_each_key_counts(name):
    "Without any one of its keys a file of pretraining is refused, and so it is with one key more or of another shape"
    theirs = to_authors(made(name))
    for k in theirs:
        rest = {n: v for n,v in theirs.items() if n != k}
        with pytest.raises((CheckpointError, KeyError)): from_authors(rest, name, num_heads=4)
    with pytest.raises(CheckpointError, match='1 unknown'): from_authors(theirs | {'blocks.0.gamma_1': torch.ones(48)}, name, num_heads=4)
    k = 'blocks.1.mlp.fc2.weight'
    with pytest.raises(CheckpointError, match=f'1 misshapen .*{k}'): from_authors(theirs | {k: theirs[k][:, :-1]}, name, num_heads=4)


# forms of files

@pytest.mark.parametrize('name', list(methods))
def test_encoder_only_and_fine_tuned_files(name, tmp_path):
    model = made(name)
    theirs = to_authors(model, decoders=False)
    enc = from_authors(theirs, name, num_heads=4)
    assert not enc.decoders and same(enc.encoder.state_dict(), model.encoder.state_dict())
    with pytest.raises(RuntimeError, match='encoder only: no reconstruction possible'): enc(torch.randn(1, 3, 32, 32), RandomMask()(1, 4))
    tuned = {k: v for k,v in theirs.items() if not k.startswith('norm.')} | {'fc_norm.weight': torch.rand(48), 'fc_norm.bias': torch.rand(48),
                                                                           'head.weight': torch.randn(7, 48), 'head.bias': torch.randn(7)}
    cls = from_authors(dict(model=tuned, optimizer={}, epoch=3), name, num_heads=4)
    assert 'optimizer' in cls.report.ignored or 'epoch' in cls.report.ignored
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        pooled = torch.nn.functional.layer_norm(model.encoder(x)[-1][:, 1:].mean(1), (48,), tuned['fc_norm.weight'], tuned['fc_norm.bias'], 1e-6)
        assert torch.allclose(to_timm(cls)(x), pooled @ tuned['head.weight'].T + tuned['head.bias'], atol=1e-5)
    for m in (enc, cls):
        again = load_model(save_model(m, tmp_path/'m'))
        assert same(again.state_dict(), m.state_dict()) and not again.decoders


def test_a_teacher_of_another_size_than_the_student_in_dbots_files():
    "A student taught by a larger model: the head has the teacher's width; the teacher is given, or named as absent"
    teacher = make_encoder('vit_tiny_patch16_224', 32, patch_size=8, width=80, depth=3, heads=4)
    theirs = to_authors(made('dbot', teacher=teacher))
    alone = from_authors(theirs, 'dbot', num_heads=4)
    assert alone.teacher is None and alone(torch.randn(1, 3, 32, 32), RandomMask()(1, 4))['features'].shape[-1] == 80
    with pytest.raises(RuntimeError, match='give it one with set_teacher'): alone.teacher_features(torch.randn(1, 3, 32, 32))
    taught = from_authors(theirs, 'dbot', num_heads=4, teacher=teacher)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): assert torch.allclose(taught.teacher_features(x), teacher.eval()(x)[-1], atol=1e-5)
    assert same(set_teacher(alone, teacher).state_dict(), taught.state_dict())
    with pytest.raises(CheckpointError, match='width 80, but the teacher given has 48'): from_authors(theirs, 'dbot', num_heads=4, teacher=made('mae'))


def test_a_teacher_with_other_statistics_sees_its_own():
    "A MAE as the teacher of a BootMAE of the same size: same shapes, other input statistics"
    mae, boot = made('mae', seed=3), made('bootmae')
    model = from_authors(to_authors(boot), 'bootmae', num_heads=4, teacher=mae)
    x = torch.rand(2, 3, 32, 32)
    stat = lambda o: torch.tensor(o)[:, None, None]
    a, b = ((x - stat(m.method.mean))/stat(m.method.std) for m in (model, mae))
    with torch.no_grad(): assert torch.allclose(model.teacher_features(a), mae.encoder(b)[-1][:, 1:], atol=1e-5)


@pytest.mark.parametrize('kw', [dict(name='mae', teacher='frozen', teacher_depth=0), dict(name='dbot', targets=('pixels',), teacher_depth=0, pixel_width=32)], ids=str)
def test_a_model_without_features_comes_back_whatever_was_said_of_its_teacher(kw, tmp_path):
    model = made(**kw)
    assert model.method.teacher is None and load_model(save_model(model, tmp_path/'m')).method == model.method


def test_statistics_of_a_teacher_for_other_channels_and_by_hand():
    "timm's grey models tell three channels' statistics; mean and std come together"
    timm_model = lambda c: timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, in_chans=c, depth=1)
    for c in (1, 4):
        model = made('dbot', in_chans=c, teacher=timm_model(c))
        assert model.config['teacher']['mean'] == [.5]*c and model.teacher_features(torch.rand(2, c, 32, 32)).shape == (2, 17, 192)
    enc = make_encoder('vit_tiny_patch16_224', 32, patch_size=8, width=48, depth=1, heads=4)
    for kw in (dict(mean=(.5,)*3), dict(std=(.5,)*3)):
        with pytest.raises(ValueError, match='give both'): set_teacher(made('dbot'), enc, **kw)
    model = set_teacher(made('dbot'), timm_model(3), mean=(.4,)*3)
    assert model.config['teacher']['mean'] == [.4]*3 and model.config['teacher']['std'] == [.5]*3
    class Made(TorchDispatchMode):
        "Tensors from Python's numbers, each of which a GPU would have to be waited for"
        n = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None): self.n += 'lift_fresh' in func.name(); return func(*args, **kwargs or {})
    x,(mean,std) = torch.rand(2, 3, 32, 32), (torch.tensor(o)[:, None, None] for o in (model.method.mean, model.method.std))
    first = model.teacher_features(x)
    with Made() as seen: assert torch.equal(model.teacher_features(x), first)
    assert not seen.n
    assert torch.allclose(model._for_teacher(x), (x*std + mean - .4)/.5)
    with pytest.raises(ValueError, match='nothing to teach'): made('mae', teacher=enc)


def test_a_teacher_without_any_prefix_token():
    vit = timm.create_model('vit_relpos_small_patch16_224', img_size=64, embed_dim=48, depth=2, num_heads=3)
    model = made('dbot', teacher=vit)
    assert not model.method.with_cls and model.teacher_features(torch.rand(2, 3, 32, 32)).shape == (2, 16, 48)


def test_raw_pixel_models_are_drawn_raw():
    model = from_authors(to_authors(made('mae')), 'mae', num_heads=4, norm_pixels=False)
    x, mask = torch.randn(2, 3, 32, 32), RandomMask()(2, 4)
    assert model.method.norm_pixels is False and mim_loss(model, x, mask)[0] == mim_loss(model, x, mask, norm_pixels=False)[0]


# damaged and hostile files

class Hostile:
    def __init__(self, file): self.file = file
    def __reduce__(self): return (Path.touch, (Path(self.file),))


def broken_files(tmp_path, good, suffix):
    "Name -> file: cut short, one bit flipped, a wrong shape, renamed keys, a pickle that would run code"
    data = good.read_bytes()
    write = lambda name, b: (tmp_path/f'{name}{suffix}').write_bytes(b)
    write('cut', data[:len(data)*2//3]); write('empty', b''); write('text', b'<html>not found</html>')
    for i,part in enumerate((.3, .5, .8)):
        flipped = bytearray(data); flipped[int(len(data)*part)] ^= 4
        write(f'flipped{i}', bytes(flipped))
    if suffix == '.pth':
        state = read_file(good)
        torch.save(dict(state, args=Hostile(tmp_path/'ran')), tmp_path/'hostile.pth')
        model = state['model']
        k = 'blocks.0.attn.proj.weight'
        torch.save(dict(model=model | {k: model[k][:-1]}), tmp_path/'shape.pth')
        torch.save(dict(model={n.replace('mlp.fc1', 'mlp.first'): v for n,v in model.items()}), tmp_path/'renamed.pth')
    else:
        tensors = load_file(good)
        k = 'encoder.vit.blocks.0.attn.proj.weight'
        from safetensors import safe_open
        with safe_open(good, 'pt') as f: head = f.metadata()
        save_file(tensors | {k: tensors[k][:-1].contiguous()}, tmp_path/f'shape{suffix}', metadata=head)
        save_file({n.replace('mlp.fc1', 'mlp.first'): v for n,v in tensors.items()}, tmp_path/f'renamed{suffix}', metadata=head)
    return [p for p in sorted(tmp_path.iterdir()) if p.suffix == suffix and p != good]


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_bad_files_give_one_plain_error_and_change_nothing(tmp_path, suffix):
    model = made('mae')
    good = tmp_path/f'good{suffix}'
    if suffix == '.pth': torch.save(dict(model=to_authors(model), args=argparse.Namespace(lr=1.)), good)
    else: save_model(model, good)
    target = made('mae', seed=5)
    before = copy.deepcopy(target.state_dict())
    files = broken_files(tmp_path, good, suffix)
    assert len(files) >= 8
    for file in files:
        loads = [lambda: load_weights(target, file), lambda: from_authors(file, 'mae', num_heads=4) if suffix == '.pth' else load_model(file)] # noqa: B023
        for load in loads:
            if suffix == '.safetensors' and load is loads[0] and file.name.startswith('flipped'): continue # without a digest of its own; see the next test
            with pytest.raises(CheckpointError) as e: load()
            assert file.name in str(e.value) and '\n' not in str(e.value), (file.name, str(e.value))
        assert same(target.state_dict(), before), file.name
    assert not (tmp_path/'ran').exists()
    load_weights(target, good)
    assert same(target.state_dict(), model.state_dict())


@pytest.mark.parametrize('key', ['blocks.1.attn.v_bias', 'blocks.1.attn.q_bias', 'decode_blocks.0.c_attn.v_bias', 'lm_head.proj.bias'])
def test_missing_biases_are_named_with_the_file(key, tmp_path):
    theirs = to_authors(made('bootmae')); del theirs[key]
    torch.save(dict(model=theirs), tmp_path/'w.pth')
    for load in (lambda: from_authors(tmp_path/'w.pth', 'bootmae', num_heads=4), lambda: load_weights(made('bootmae'), tmp_path/'w.pth')):
        with pytest.raises(CheckpointError, match=r'w.pth does not fit .* \d missing'): load()


def test_a_changed_configuration_is_noticed(tmp_path):
    file = save_model(made('mae'), tmp_path/'m')
    data = file.read_bytes()
    file.write_bytes(data.replace(b'mask_ratio\\": 0.75', b'mask_ratio\\": 0.65'))
    assert file.read_bytes() != data
    with pytest.raises(CheckpointError, match='m.safetensors is damaged: its configuration'): load_model(file)


@pytest.mark.parametrize('key', ['digest', 'config_digest'])
def test_a_digest_does_not_get_lost(key, tmp_path):
    "One flipped bit in the name of the digest must not let another one through"
    file = save_model(made('mae'), tmp_path/'m')
    data = bytearray(file.read_bytes()); data[data.index(f'"{key}"'.encode()) + 1] ^= 1; data[-100] ^= 1
    file.write_bytes(data)
    for load in load_model, read_file, lambda f: load_weights(made('mae'), f):
        with pytest.raises(CheckpointError, match='m.safetensors is damaged'): load(file)


def test_what_the_authors_layouts_cannot_hold_is_refused():
    both = dict(targets=('pixels', 'features'), pixel_width=32)
    for model in (made('dbot', **both), made('mae', **both, teacher='momentum')):
        with pytest.raises(ValueError, match='has no place for a decoder of'): to_authors(model)
    boot = made('bootmae')
    boot.encoder.vit.pos_embed.data[0, 1] += 1
    with pytest.raises(ValueError, match='other positions than the encoder'): to_authors(boot)
    assert len(to_authors(boot, decoders=False)) == len(to_authors(encoder_only(boot)))


def test_heads_of_the_student_are_not_those_of_a_teacher_of_another_width():
    big = made('mae', width=128, heads=2)
    student = made('dbot', teacher=big)
    file = dict(model=to_authors(big))
    again = from_authors(dict(model=to_authors(student)), 'dbot', num_heads=4, teacher=file)
    assert again.teacher.heads == 2 and again.encoder.heads == 4


def test_norm_pixels_true_is_the_papers():
    assert from_authors(to_authors(made('mae')), 'mae', num_heads=4, norm_pixels=True).method.norm_pixels == 'patch'


def test_our_own_files_are_checked_against_their_digest_in_load_weights_too(tmp_path):
    model = made('mae')
    good = save_model(model, tmp_path/'good')
    data = bytearray(good.read_bytes()); data[-100] ^= 1
    (tmp_path/'flipped.safetensors').write_bytes(data)
    target = made('mae', seed=5); before = copy.deepcopy(target.state_dict())
    with pytest.raises(CheckpointError, match='flipped.safetensors is damaged'): load_weights(target, tmp_path/'flipped.safetensors')
    assert same(target.state_dict(), before)


def test_a_digest_beside_a_file_is_kept_to(tmp_path):
    theirs = to_authors(made('mae'))
    save_file(theirs, tmp_path/'w.safetensors')
    (tmp_path/'w.safetensors.sha256').write_text('0'*64 + '  w.safetensors\n')
    with pytest.raises(CheckpointError, match='its SHA-256 is not the one in w.safetensors.sha256'): from_authors(tmp_path/'w.safetensors', 'mae', num_heads=4)


# into models that are there

@pytest.mark.parametrize('name', list(methods))
def test_weights_of_every_form_into_a_model(name, tmp_path):
    model, target = made(name, seed=1), made(name, seed=2)
    ours = save_model(model, tmp_path/'m')
    load_weights(target, ours)
    assert same(target.state_dict(), model.state_dict())
    target = made(name, seed=2)
    report = load_weights(target, to_authors(model))
    assert same(target.encoder.state_dict(), model.encoder.state_dict()) and same(target.decoders.state_dict(), model.decoders.state_dict())
    if name != 'mae': assert same(target.teacher.state_dict(), model.encoder.state_dict()) and 'teacher: a copy of the encoder' in report.missing
    if name == 'dbot':                                            # one without blocks stays
        target = made(name, seed=2, teacher_depth=0); frozen = copy.deepcopy(target.teacher.state_dict())
        report = load_weights(target, to_authors(model))
        assert same(target.teacher.state_dict(), frozen) and 'teacher: as it was' in report.missing
    target = made(name, seed=2); decoders = copy.deepcopy(target.decoders.state_dict())
    load_weights(target, to_timm(model).state_dict())
    assert same(target.encoder.state_dict(), model.encoder.state_dict()) and same(target.decoders.state_dict(), decoders)


def test_the_averaged_model_in_a_file_becomes_the_teacher():
    theirs = to_authors(made('bootmae'))
    target = made('bootmae', seed=2)
    load_weights(target, dict(model=theirs, model_ema={k: v + 1 for k,v in theirs.items()}))
    assert torch.equal(target.teacher.vit.cls_token, theirs['cls_token'] + 1)


def test_an_external_teacher_stays_when_weights_are_loaded(tmp_path):
    "A teacher that was given is not replaced by the one in a file of the same shape, and the report says so"
    source, enc = made('bootmae', seed=1), make_encoder('vit_tiny_patch16_224', 32, patch_size=8, width=48, depth=2, heads=4)
    save_model(source, tmp_path/'m')
    model = made('dbot', teacher=enc, seed=2); given = copy.deepcopy(model.teacher.state_dict())
    report = load_weights(model, tmp_path/'m.safetensors', decoders=None)
    assert same(model.teacher.state_dict(), given) and same(model.encoder.state_dict(), source.encoder.state_dict())
    assert 'teacher: as it was' in report.missing and 'teacher.vit.cls_token' in report.ignored and 'feature_mean' in report.ignored
    assert set(report.loaded) | set(report.ignored) == set(source.state_dict())
    target = made('bootmae', seed=2)
    assert set(load_weights(target, tmp_path/'m.safetensors').loaded) == set(source.state_dict()) and same(target.state_dict(), source.state_dict())


def test_a_deeper_decoder_does_not_fit_a_shallower_one():
    theirs, model = to_authors(made('mae', pixel_depth=3)), made('mae', seed=2)
    with pytest.raises(CheckpointError, match=r'unknown \(decoders.pixels.blocks.2'): load_weights(model, theirs)
    decoders = copy.deepcopy(model.decoders.state_dict())
    load_weights(model, theirs, decoders=None)
    assert same(model.decoders.state_dict(), decoders)


def test_positions_are_resampled_to_another_grid_and_patches_are_not():
    model = made('mae')
    wide = made('mae', img_size=(32, 64), seed=2)
    pos = wide.decoders['pixels'].pos_embed.clone()
    load_weights(wide, to_authors(model))
    assert wide.encoder.vit.pos_embed.shape == (1, 33, 48) and torch.equal(wide.encoder.vit.pos_embed[:, :1], model.encoder.vit.pos_embed[:, :1])
    assert torch.equal(wide.decoders['pixels'].pos_embed, pos) and torch.equal(wide.decoders['pixels'].head.weight, model.decoders['pixels'].head.weight)
    with pytest.raises(CheckpointError, match='misshapen'): load_weights(made('mae', patch_size=16), to_authors(model))


def test_positions_of_a_grid_that_is_not_square_are_resampled_as_what_they_are(tmp_path):
    "16 patches as 2 x 8 are not 4 x 4: a file of ours tells its grid; along a row of equal values nothing changes"
    model = made('mae', img_size=(16, 64))
    pos = torch.zeros(2, 8, 48); pos[1] = 1.
    model.encoder.vit.pos_embed.data[0, 1:] = pos.reshape(16, 48)
    save_model(model, tmp_path/'wide')
    square = made('mae', img_size=(32, 32), seed=2)
    load_weights(square, tmp_path/'wide.safetensors')
    rows = square.encoder.vit.pos_embed[0, 1:].reshape(4, 4, 48)
    assert torch.allclose(rows, rows[:, :1].expand_as(rows), atol=1e-5) and (rows[1:, 0, 0] > rows[:-1, 0, 0]).all()
    load_weights(made('mae', img_size=(16, 64), seed=3), tmp_path/'wide.safetensors')


# our own files with teachers of every kind

def teachers():
    "Name -> keywords of a model"
    clip = timm.create_model('vit_base_patch16_clip_quickgelu_224', img_size=64, embed_dim=64, depth=3, num_heads=2)
    beit = timm.create_model('beit_base_patch16_224', img_size=64, embed_dim=80, depth=2, num_heads=2)
    dino = timm.create_model('vit_small_patch14_reg4_dinov2', img_size=56, embed_dim=48, depth=1, num_heads=3)
    return dict(copy={}, embedding=dict(teacher_depth=0), deeper=dict(teacher=make_encoder('vit_tiny_patch16_224', 32, patch_size=8, width=96, depth=4, heads=4)),
                clip=dict(teacher=clip), beit=dict(teacher=beit), registers=dict(teacher=dino),
                blocks=dict(feature_blocks=(0, -1)), average=dict(feature_blocks=(0, 1), feature_average=True))


@pytest.mark.parametrize('kind', ['copy', 'embedding', 'deeper', 'clip', 'beit', 'registers', 'blocks', 'average'])
def test_checkpoints_keep_the_teacher(kind, tmp_path):
    model = made('dbot', **teachers()[kind])
    for p in model.teacher.parameters(): p.data.add_(torch.randn_like(p)*.02)
    again = load_model(save_model(model, tmp_path/'m'))
    assert same(again.state_dict(), model.state_dict()) and again.method == model.method
    x, mask = torch.randn(2, 3, 32, 32), RandomMask()(2, 4)
    with torch.no_grad():
        assert torch.equal(again.teacher_features(x), model.teacher_features(x))
        assert mim_loss(again, x, mask)[0].item() == mim_loss(model, x, mask)[0].item()


@pytest.mark.parametrize('kind', ['embedding', 'clip', 'blocks'])
def test_next_stage_and_its_checkpoint(kind, tmp_path):
    model = made('dbot', **teachers()[kind])
    trained = copy.deepcopy(model.encoder.state_dict())
    next_stage(model, 11)
    assert same(model.teacher.state_dict(), trained)
    assert same(load_model(save_model(model, tmp_path/'m')).state_dict(), model.state_dict())


def test_teachers_by_file(tmp_path):
    mae = made('mae')
    save_model(mae, tmp_path/'ours'); torch.save(dict(model=to_authors(made('bootmae', seed=4))), tmp_path/'boot.pth')
    args = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4)
    timm.models.save_for_hf(to_timm(mae), tmp_path/'hf', safe_serialization=True, model_config=dict(model_args=args))
    for source in (tmp_path/'ours.safetensors', str(tmp_path/'boot.pth'), f"local-dir:{tmp_path/'hf'}"):
        model = made('dbot', teacher=load_teacher(source, grid=(4, 4), num_heads=4))
        assert model.teacher.dim == 48 and model.teacher.depth == 2
    assert same({k: v for k,v in model.teacher.vit.state_dict().items()}, to_timm(mae).state_dict())


# timm

@pytest.mark.parametrize('kw', [{}, dict(img_size=(32, 48)), dict(in_chans=1), dict(class_token=False), dict(in_chans=4, img_size=(16, 40))])
def test_to_timm_equals_the_encoder_and_starts_a_model(kw):
    model = mim_model('bootmae', **small | dict(pixel_width=32, seed=0) | kw).eval()
    vit = to_timm(model)
    x = torch.randn(2, model.in_chans, *model.img_size)
    with torch.no_grad(): assert torch.allclose(vit.forward_features(x), model.encoder.norm(model.encoder(x)[-1]), atol=1e-5)
    again = from_timm(vit, 'mae', pixel_width=32)
    assert misfit(again.encoder.state_dict(), model.encoder.state_dict()) == '' and same(again.encoder.vit.blocks.state_dict(), vit.blocks.state_dict())
    assert guess_layout(vit.state_dict()) == 'timm'


def test_encoder_only_has_no_more_than_the_encoder(tmp_path):
    model = made('bootmae')
    path = save_model(encoder_only(model), tmp_path/'e')
    assert set(load_file(path)) == {k for k in model.state_dict() if k.startswith('encoder.')}
    assert os.path.getsize(path) < os.path.getsize(save_model(model, tmp_path/'m'))/2


def test_weights_of_another_image_size_bring_their_teacher(tmp_path):
    tiny = dict(arch='vit_tiny_patch16_224', patch_size=8, width=24, depth=2, heads=3, pixel_width=24, pixel_depth=1, feature_depth=1)
    source,target = (mim_model('bootmae', img_size=o, seed=i, **tiny) for i,o in enumerate((32, 48)))
    with torch.no_grad(): [p.add_(torch.randn(p.shape)) for p in source.teacher.parameters()]               # as in training: it is no copy of the encoder
    report = load_weights(target, save_model(source, tmp_path/'m'), decoders=None)
    own,theirs = target.teacher.vit.state_dict(), source.teacher.vit.state_dict()
    assert all(torch.equal(own[k], v) for k,v in theirs.items() if k != 'pos_embed')
    torch.testing.assert_close(own['pos_embed'], resample_abs_pos_embed(theirs['pos_embed'], [6, 6], [4, 4], 1))
    assert not any('teacher' in o for o in report.missing)
