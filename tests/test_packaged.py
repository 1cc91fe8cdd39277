"""The model that comes with the package: found by its name, in the wheel, what its card says it is, and better than a guess; and files in half precision."""
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from bootmae_nb import checkpoints, cli
from bootmae_nb.checkpoints import (CheckpointError, file_digest, find_checkpoint, load_model, load_teacher, load_weights, packaged_file, read_weights, save_model,
                                    to_timm)
from bootmae_nb.explore import named_models
from bootmae_nb.hub import from_pretrained
from bootmae_nb.images import sample_photo, sample_photos
from bootmae_nb.models import count_parameters, mim_model
from bootmae_nb.patches import mask_order, normalise, patch_stats, patchify, take
from bootmae_nb.viz import View, mask_for, model_input
from common import equal

root = Path(__file__).parents[1]
tiny = dict(arch='vit_tiny_patch16_224', img_size=32, patch_size=8, width=48, depth=2, heads=3, pixel_width=48)
half_too = {torch.float16, torch.int64}, {torch.float32, torch.int64}


@pytest.fixture(scope='module')
def model(): return load_model('packaged')


# half precision

def test_half_precision_is_half_as_large_and_predicts_nearly_the_same(tmp_path, model):
    files = [save_model(model, tmp_path/name, half=half) for name, half in (('half', True), ('full', False))]
    assert tuple({v.dtype for v in load_file(o).values()} for o in files) == half_too
    assert .49 < files[0].stat().st_size/files[1].stat().st_size < .51
    changed = mim_model('bootmae', **tiny, seed=3).eval()                                        # the packaged weights are rounded already
    again = load_model(save_model(changed, tmp_path/'changed', half=True))
    assert not equal(again.state_dict(), changed.state_dict()) and equal(load_model(files[0]).state_dict(), model.state_dict())
    x = torch.rand(2, 3, 32, 32); mask = mask_for(changed, None, 2)
    with torch.no_grad():
        for k, a in changed(x, mask).items(): assert (a - again(x, mask)[k]).std() < 3e-3*a.std()
    assert json.loads((tmp_path/'half.json').read_text())['sha256'] == file_digest(files[0])


def test_what_half_precision_cannot_hold_is_refused_and_the_file_kept(tmp_path):
    model = mim_model('mae', **tiny, seed=0)
    file = save_model(model, tmp_path/'m', half=True); before = file.read_bytes()
    with torch.no_grad(): model.encoder.vit.norm.weight[3] = -7e4
    with pytest.raises(CheckpointError, match=r'm.safetensors is not saved, because 1 of \d+ tensors hold values beyond 65,504.*encoder.vit.norm.weight.*leave out half'):
        save_model(model, file, half=True)
    assert file.read_bytes() == before
    save_model(model, file)
    with torch.no_grad(): model.encoder.vit.norm.weight[3] = torch.nan
    with pytest.raises(CheckpointError, match='NaN or infinity'): save_model(model, file, half=True)


def test_a_flipped_bit_in_a_half_file_is_found(tmp_path):
    file = save_model(mim_model('mae', **tiny, seed=0), tmp_path/'m', half=True)
    data = bytearray(file.read_bytes()); data[-100] ^= 1; file.write_bytes(data)
    with pytest.raises(CheckpointError, match='damaged'): load_model(file)


def test_half_files_load_as_float32_everywhere(tmp_path):
    model = mim_model('bootmae', **tiny, seed=0)
    file = save_model(model, tmp_path/'m', half=True)
    assert {v.dtype for v in read_weights(file)['model'].values()} == half_too[1]
    for target in mim_model('bootmae', **tiny, seed=1), mim_model('bootmae', **tiny | dict(img_size=48), seed=1):
        load_weights(target, file)
        assert {v.dtype for v in target.state_dict().values()} == half_too[1]
    assert load_teacher(file).encoder.vit.pos_embed.dtype == torch.float32


# by its name

def test_the_name_works_wherever_a_path_does(tmp_path, monkeypatch, model, capsys):
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('BOOTMAE_DEVICE', 'cpu')
    state = model.state_dict()
    named = [load_model(Path('packaged')), load_teacher('packaged'), from_pretrained('packaged'), named_models('packaged')['packaged'], load_model(packaged_file())]
    for o in named: assert equal(o.state_dict(), state)
    target = mim_model('bootmae', model.config['arch'], 96, patch_size=8, depth=6, pixel_width=192, seed=5)
    assert not load_weights(target, 'packaged').missing and equal(target.state_dict(), state)
    student = mim_model('dbot', **tiny | dict(img_size=96), teacher=load_teacher('packaged'))
    assert equal(student.teacher.state_dict(), model.teacher.state_dict()) or equal(student.teacher.state_dict(), model.encoder.state_dict())
    cli.bootmae_convert('packaged', Path('encoder.safetensors'), to_layout='timm')
    assert equal(load_file('encoder.safetensors'), to_timm(model).state_dict())
    cli.bootmae_reconstruct(Path('packaged'), [str(next(o.path for o in sample_photos()))], out=Path('pictures'))
    assert len(list(Path('pictures').iterdir())) == 1


def test_a_learner_starts_from_it():
    from bootmae_nb.data import mim_dls
    from bootmae_nb.learner import mim_learner
    dls = mim_dls(img_size=48, bs=4, num_workers=0, crops_per_image=1)
    learn = mim_learner(dls, 'vit_tiny_patch16_224', patch_size=8, depth=6, pixel_width=192, weights='packaged')
    own, given = learn.model.state_dict(), load_model('packaged').state_dict()
    assert all(torch.equal(v, given[k]) for k, v in own.items() if '.blocks.' in k and not k.startswith('decoders.features')) and learn.model.img_size == (48, 48)


def test_a_file_or_folder_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint('packaged') == packaged_file() and find_checkpoint('other') == Path('other') and find_checkpoint('./packaged/x') == Path('packaged/x')
    mine = mim_model('mae', **tiny, seed=7)
    save_model(mine, 'packaged/model')
    assert equal(load_model('packaged').state_dict(), mine.state_dict()) and equal(from_pretrained('packaged').state_dict(), mine.state_dict())


def test_a_package_without_its_model_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, 'files', lambda name: tmp_path)
    for f in packaged_file, lambda: load_model('packaged'), lambda: load_weights(mim_model('mae', **tiny), 'packaged'):
        with pytest.raises(CheckpointError, match='bootmae_tiny.safetensors is not there: this copy of bootmae_nb came without its model'): f()


def test_the_wheel_holds_it(tmp_path):
    "Built as an installer builds it, without a network, and unpacked as it installs it"
    source = tmp_path/'source'; source.mkdir()
    for o in ('pyproject.toml', 'README.md', 'LICENSE', 'bootmae_nb'): os.symlink(root/o, source/o)
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHONSAFEPATH')}
    python = lambda code, cwd: subprocess.run([sys.executable, '-c', code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    done = python(f'from setuptools import build_meta; print(build_meta.build_wheel({str(tmp_path)!r}))', source)
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(tmp_path/done.stdout.split()[-1]) as z:
        names = {o for o in z.namelist() if o.startswith('bootmae_nb/data/')}
        z.extractall(tmp_path/'installed')
    assert names == {f'bootmae_nb/data/{o}' for o in ('bootmae_tiny.safetensors', 'bootmae_tiny.json', 'README.md')}
    done = python('from importlib.util import find_spec; from bootmae_nb.checkpoints import load_model, packaged_file; load_model("packaged"); '
                  'print(packaged_file(), find_spec("bootmae_nb.data").origin)', tmp_path/'installed')
    assert done.returncode == 0, done.stderr[-2000:]
    file, module = done.stdout.split()
    package = tmp_path/'installed'/'bootmae_nb'
    assert file == str(package/'data'/'bootmae_tiny.safetensors') and module == str(package/'data.py')       # which the folder does not hide


# what it is

def test_the_card_and_the_json_tell_of_this_file(model, tmp_path, monkeypatch):
    file = packaged_file(); about, card = json.loads(file.with_suffix('.json').read_text()), (file.parent/'README.md').read_text()
    assert about['sha256'] == file_digest(file) and about['parameters'] == count_parameters(model) and about['config'] == json.loads(json.dumps(model.config))
    assert about['sha256'] in card and all(f'{sum(p.numel() for p in m.parameters()):,}' in card for m in (model.encoder, model.decoders, model.teacher))
    assert ModelCard(card).data.license == about['licence'] and f"{file.stat().st_size/1e6:.1f} MB" in card
    assert f"{about['knn_cifar10']['pretrained']:.1%}" in card and f"{about['share_of_constant_guess']['pixels']:.1%}" in card
    monkeypatch.syspath_prepend(str(root/'tools'))
    from finish_packaged import write_card
    for o in file.parent.glob('bootmae_tiny.*'): os.symlink(o, tmp_path/o.name)
    assert write_card(tmp_path/file.name).read_text() == card, 'the card was edited by hand, or its text in tools/finish_packaged.py changed: write it again'


def test_it_is_small_and_stored_in_half_precision():
    assert packaged_file().stat().st_size < 25e6
    assert {v.dtype for v in load_file(packaged_file()).values()} == half_too[0]


@torch.no_grad()
def test_it_fills_in_photographs_that_it_never_saw_better_than_a_guess(model):
    "A guess of zero for normalised pixels is the mean of each patch"
    x = torch.cat([model_input(model, sample_photo(o.name)) for o in sample_photos()])
    p = patchify(x, 8); targ = normalise(p, *patch_stats(p, 'channel'))
    error, guess = 0., 0.
    for seed in range(4):
        mask = mask_for(model, None, len(x), seed); t = take(targ, mask_order(mask)[1])
        error += (model(x, mask)['pixels'] - t).square().mean().item(); guess += t.square().mean().item()
    assert error < .98*guess, f'{error/guess:.1%} of the error of a guess'


def test_its_features_are_those_of_the_image(model):
    "What it predicts for a hidden patch is nearer to what the teacher sees there than to what it sees in another photograph"
    own, other = [], []
    views = [View(model, sample_photo(o.name), seed=i) for i, o in enumerate(sample_photos())]
    for v, w in zip(views, views[1:] + views[:1]):
        own.append(v.mean_hidden(v.similarity())); other.append(v.mean_hidden(v.similarity(other=w)))
    own, other = (sum(o)/len(o) for o in (own, other))
    assert own > other + .1, (own, other)
