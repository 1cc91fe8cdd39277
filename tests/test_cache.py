"""The cache of decoded images: the same crops as without it, killed and damaged in every way, and two at once."""
import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import bootmae_nb.cache as cache
import bootmae_nb.data as data
from bootmae_nb.cache import CacheError, Decoded, DecodedImages, build_cache, resample_crops
from bootmae_nb.callbacks import DataWait
from bootmae_nb.data import CropImage, mim_dls
from bootmae_nb.images import ImageError, image_files, open_image, sample_photos
from bootmae_nb.learner import mim_learner
from bootmae_nb.runs import RunState
from common import equal, quietly, state
from corpus import make_corpus, turned
from forks import fork, run_forked, wait

tiny = dict(arch='vit_tiny_patch16_224', width=32, depth=1, heads=2, patch_size=8, pixel_width=32, pixel_depth=1)


def picture(i, size=(60, 40), mode='RGB'):
    "A smooth picture of its own"
    rng = np.random.default_rng(i)
    x = rng.integers(0, 256, (6, 8, 4), dtype=np.uint8)
    return Image.fromarray(x, 'RGBA').resize(size, Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture
def folder(tmp_path):
    "Twelve small pictures, wide and high"
    for i in range(12): picture(i, (60, 40) if i % 3 else (36, 50)).save(tmp_path/f'{i:02}.png')
    return tmp_path


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Photographs of several sizes as JPEG files, upright and turned"
    path = tmp_path_factory.mktemp('photos')
    for i,o in enumerate(sample_photos()[:8]):
        exif = Image.Exif(); exif[0x0112] = 6 if i % 2 else 1
        open_image(o.path).resize((500, 375) if i % 3 else (240, 360)).save(path/f'{o.name}.jpg', quality=92, exif=exif)
    return path


def loaders(source, **kw): return mim_dls(source, **dict(img_size=16, bs=4, num_workers=0, device='cpu', crops_per_image=2, seed=3) | kw)
def batches(dl): return [b[0].as_subclass(torch.Tensor) for b in dl]
def epoch(dl): return torch.cat(batches(dl))
def same(a, b): return a.shape == b.shape and torch.equal(a, b)
def opener(dls): return dls.train.dataset.tls[0].tfms.fs[0]


def postponed(*args, **kw):
    "Loaders whose crops are resized by the batch, as on a GPU"
    dls = loaders(*args, **kw)
    opener(dls).later = True
    return dls


def count(monkeypatch):
    "Names of the files that are decoded from now on, in this process"
    names,real = [], cache._decode
    monkeypatch.setattr(cache, '_decode', lambda o, *a: (names.append(Path(o).name if isinstance(o, (str, Path)) else o), real(o, *a))[1])
    return names


def recorded(f):
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        return f(), [str(o.message) for o in w if issubclass(o.category, UserWarning)]


# ---- the same crops


@pytest.mark.parametrize('chans', [1, 3, 4])
@pytest.mark.parametrize('size', [16, (16, 24)])
def test_copies_that_are_not_reduced_change_nothing(folder, chans, size):
    kw = dict(in_chans=chans, img_size=size)
    a,b = loaders(folder, **kw), loaders(folder, decoded=folder/'cache', decoded_side=36, **kw)
    small = {i for i,o in enumerate(a.train.dataset.items) if min(Image.open(o).size) <= 36}
    for _ in range(2):
        x,y = epoch(a.train), epoch(b.train)
        assert a.train.batch_items(1) == b.train.batch_items(1) and x.shape == y.shape
        names = [o for i in range(len(a.train)) for o in a.train.batch_items(i)]
        exact = torch.tensor([min(Image.open(o).size) <= 36 for o in names])
        assert small and same(x[exact], y[exact]) and 0 < (x[~exact] - y[~exact]).abs().mean() < .02
    whole = loaders(folder, decoded=folder/'cache', decoded_side=40, **kw)
    assert same(epoch(loaders(folder, **kw).train), epoch(whole.train)) and same(epoch(a.valid), epoch(whole.valid))


def crops_drawn(monkeypatch, dls):
    "Files, sizes and boxes of all crops of two epochs and of validation"
    drawn,real = [], CropImage.before_call
    def spy(self, b, split_idx):
        real(self, b, split_idx)
        drawn.append((tuple(self.orig_sz), tuple(self.tl), tuple(self.cp_size)))
    with monkeypatch.context() as m:
        m.setattr(CropImage, 'before_call', spy)
        return drawn, [epoch(dls.train), epoch(dls.train), epoch(dls.valid)]


@pytest.mark.parametrize('size', [24, 96])
def test_boxes_are_those_of_the_files(monkeypatch, photos, tmp_path, size):
    kw = dict(img_size=size, valid_pct=.3)
    (boxes,a),(other,b) = (crops_drawn(monkeypatch, o) for o in (loaders(photos, **kw), loaders(photos, decoded=tmp_path, **kw)))
    assert boxes == other and len(set(boxes)) > 20
    if size == 24: assert max(max(s) for s,_,_ in boxes) < 300, 'JPEG files were decoded at a reduced size'
    for x,y in zip(a, b): assert (x - y).abs().mean() < .03


def test_the_sharper_the_copies_the_nearer(photos, tmp_path):
    a = epoch(loaders(photos, img_size=48).train)
    apart = [(a - epoch(loaders(photos, img_size=48, decoded=tmp_path, decoded_side=s).train)).abs().mean().item() for s in (24, 55, 110, 400)]
    assert apart == sorted(apart, reverse=True) and apart[1] < .02 and apart[3] < .004, apart


def test_crops_of_the_batch_are_those_of_the_images(photos, tmp_path):
    for kw in dict(), dict(in_chans=1), dict(img_size=(16, 40)), dict(img_size=64, min_scale=.1):
        a,b = loaders(photos, decoded=tmp_path, **kw), postponed(photos, decoded=tmp_path, **kw)
        for i in 0, 1:
            x,y = next(iter(a[i]))[0], next(iter(b[i]))[0]
            assert type(x) is type(y) and x.dtype == y.dtype == torch.float32 and y.is_contiguous() and 0 <= y.min() < y.max() <= 1
            assert (x - y).abs().max() < .03 and (x - y).abs().mean() < .003, 'rounded to bytes twice, or not'


def test_the_batch_resizes_opacity_as_pillow_does(tmp_path):
    x = np.random.default_rng(0).integers(60, 200, (50, 70, 4), dtype=np.uint8); x[10:30, 20:50, 3] = 0
    d = Decoded(x, (70, 50)).cropped((0, 0), (70, 50))
    want = torch.from_numpy(np.array(Image.fromarray(x).resize((24, 16), Image.Resampling.BICUBIC))).permute(2, 0, 1).float()
    got = resample_crops(torch.from_numpy(x)[None], torch.tensor([(*d.box, 70, 50, 0)]), (16, 24))[0]
    assert (got - want).abs()[:, want[3] > 60].max() < 4 and (got - want).abs()[:, want[3] > 60].mean() < .8


@pytest.mark.parametrize('autocast', [False, True])
def test_resampling_equals_torchvision(autocast):
    resized_crop = pytest.importorskip('torchvision.transforms.v2.functional').resized_crop     # comes with timm and fastai
    gen = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (6, 60, 80, 3), generator=gen, dtype=torch.uint8)
    boxes = [(0, 0, 80, 60), (5, 7, 70, 40), (79, 59, 1, 1), (0, 30, 3, 30), (10, 0, 9, 9), (40, 10, 16, 24)]
    packed,params = torch.full_like(x, 255), []
    for o,i,(x0,y0,w,h) in zip(packed, x, boxes): o[:h, :w] = i[y0:y0 + h, x0:x0 + w]; params.append((0, 0, w, h, w, h, x0 % 2))
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast): got = resample_crops(packed, torch.tensor(params, dtype=torch.float32), (24, 16))
    for y,i,(x0,y0,w,h) in zip(got, x, boxes):
        want = resized_crop(i.permute(2, 0, 1).float(), y0, x0, h, w, (24, 16), interpolation=3, antialias=True).clamp(0, 255)
        assert torch.allclose(y, want.flip(2) if x0 % 2 else want, atol=1e-3)
    assert got.dtype == torch.float32


def test_boxes_between_pixels_are_pillows():
    x = np.asarray(picture(0, (90, 70))) // 2 + 60                      # Pillow cuts off what is above 255 between rows and columns
    for tl,size in ((13, 8), (301, 222)), ((0, 0), (900, 700)), ((100, 511), (77, 40)):
        d = Decoded(x, (900, 700)).cropped(tl, size)
        want = np.asarray(Image.fromarray(d.pixels).resize((20, 12), Image.Resampling.BICUBIC, box=d.box)).astype(float)
        got = resample_crops(torch.from_numpy(d.pixels.copy())[None], torch.tensor([(*d.box, *d.pixels.shape[1::-1], 0)]), (12, 20))[0]
        assert np.abs(got.permute(1, 2, 0).numpy() - want).max() < 2.1


@pytest.mark.parametrize('shape', [(1, 1), (1, 50), (50, 1), (2, 3), (700, 1), (2000, 9)])
def test_tiny_images_and_strips(tmp_path, shape):
    for i in range(3): Image.new('RGB', shape, (200, i, 9)).save(tmp_path/f'{i}.png')
    for make in loaders, postponed:
        dls = make(tmp_path, img_size=(16, 48), crops_per_image=10, decoded=tmp_path/'c', decoded_side=8)
        for dl in dls: assert (epoch(dl)[:, 0] - 200 / 255).abs().max() < 1e-5, 'no padding'


@pytest.mark.parametrize('make', [loaders, postponed])
def test_workers_shards_and_skipped_batches(folder, make):
    kw = dict(decoded=folder/'cache', decoded_side=20)
    a,b = make(folder, **kw), make(folder, num_workers=2, **kw)
    for _ in range(2): x = epoch(a.train); assert same(x, epoch(b.train))
    assert same(epoch(a.valid), epoch(b.valid))
    a.train.epoch = b.train.epoch = 0; a.train.skip = 2
    assert same(epoch(a.train), x[8:]) and same(epoch(b.train), x)
    shards = [a.train.new(bs=2, shard=(i, 2), epoch=0) for i in (0, 1)]
    for whole,*parts in zip(x.split(4), *map(batches, shards)): assert torch.allclose(torch.stack(parts, 1).flatten(0, 1), whole, atol=1e-6)


def test_what_is_left_alone(folder):
    "Global random numbers, and the names of a batch's files"
    draw = lambda: (torch.rand(1).item(), np.random.rand())
    torch.manual_seed(0); np.random.seed(0); want = draw()
    torch.manual_seed(0); np.random.seed(0)
    dls = loaders(folder, decoded=folder/'cache'); epoch(dls.train); dls.show_batch(show=False)
    assert draw() == want and all(isinstance(o, Path) and o.suffix == '.png' for o in dls.train.batch_items(0))


def test_exported_loaders_open_what_is_not_in_the_cache(folder, tmp_path_factory):
    dls = loaders(folder, decoded=folder/'cache', decoded_side=20)
    empty = pickle.loads(small := pickle.dumps(dls.new_empty()))
    assert len(small) < 20_000
    other = tmp_path_factory.mktemp('other')/'x.png'; picture(99).save(other)
    for items in [other], [other.read_bytes()], [np.asarray(Image.open(other))], sorted(folder.glob('*.png')):
        assert same(epoch(empty.test_dl(items)), epoch(dls.test_dl(items)))
    assert same(epoch(pickle.loads(pickle.dumps(dls)).train), epoch(dls.train))
    shutil.rmtree(folder/'cache')
    assert same(epoch(pickle.loads(small).test_dl([other])), epoch(dls.test_dl([other]))), 'the cache need not be there'


# ---- going on


@pytest.mark.parametrize('make', [loaders, postponed])
def test_a_run_goes_on_to_the_bit(folder, tmp_path_factory, make):
    out = tmp_path_factory.mktemp('run')
    def learner(folder_=out): return mim_learner(make(folder, decoded=folder/'cache', bs=8), method='mae', cbs=RunState(folder_, steps=2, epochs=None), **tiny)
    whole = learner(out/'whole'); quietly(whole, 'fit', 2, 1e-3)
    def killed():
        learn = learner()
        stop = lambda i, b, real=learn.one_batch: (os.kill(os.getpid(), signal.SIGKILL) if learn.train_iter == 3 else None, real(i, b))
        learn.one_batch = stop
        quietly(learn, 'fit', 2, 1e-3)
    assert run_forked(killed) == -signal.SIGKILL
    again = learner(); quietly(again, 'resume', out)
    assert equal(state(whole.model), state(again.model))


def test_a_run_does_not_go_on_with_other_copies(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp('run')
    def learner(**kw): return mim_learner(loaders(folder, **kw), method='mae', cbs=RunState(out, steps=1), **tiny)
    quietly(learner(decoded=folder/'cache'), 'fit', 1, 1e-3)
    for kw in dict(), dict(decoded=folder/'cache', decoded_side=30):
        with pytest.raises(ValueError, match='other settings.*ResampleCrops'): quietly(learner(**kw), 'resume', out)
    quietly(learner(decoded=folder/'elsewhere'), 'resume', out)


# ---- building


def test_files_are_decoded_once(folder, monkeypatch):
    seen = count(monkeypatch)
    for o in folder.glob('*.png'): os.utime(o, (1e9, 1e9))
    build_cache(folder, folder/'cache', 20); assert sorted(seen) == sorted(o.name for o in folder.glob('*.png'))
    dls = loaders(folder, decoded=folder/'cache', decoded_side=20); [epoch(o) for o in dls]
    assert len(seen) == 12


def test_states_of_files_spare_reading_them(folder, monkeypatch):
    monkeypatch.setattr(data, '_SETTLED', -1)
    build_cache(folder, folder/'cache')
    monkeypatch.setattr(cache, 'file_digest', lambda *_: 1/0)
    assert len(build_cache(folder, folder/'cache')) == 12
    os.utime(folder/'03.png', (1e9, 1e9))
    with pytest.raises(ZeroDivisionError): build_cache(folder, folder/'cache')
    monkeypatch.undo(); monkeypatch.setattr(data, '_SETTLED', -1)
    lines = (folder/'cache'/'256px_rgb'/'index.jsonl').read_bytes().count(b'\n')
    seen = count(monkeypatch); build_cache(folder, folder/'cache')
    assert seen == [] and (folder/'cache'/'256px_rgb'/'index.jsonl').read_bytes().count(b'\n') > lines, 'its content is known'


def test_changed_added_and_removed_files(folder, monkeypatch):
    c = build_cache(folder, folder/'cache', 20); size = c.n_bytes
    seen = count(monkeypatch)
    picture(77, (90, 90)).save(folder/'03.png'); picture(78).save(folder/'new.png'); (folder/'05.png').unlink()
    shutil.copy(folder/'07.png', folder/'twin.png')
    dls = loaders(folder, decoded=folder/'cache', decoded_side=20)
    assert sorted(seen) == ['03.png', 'new.png'] and {o.name for o in [*dls.train_ds.items, *dls.valid_ds.items]} == {o.name for o in folder.glob('*.png')}
    assert dls.decoded[folder/'03.png'][1] == (90, 90) and dls.decoded.n_bytes == size + 20*20*3 + 20*30*3
    assert np.array_equal(dls.decoded[folder/'twin.png'][0], dls.decoded[folder/'07.png'][0])
    moved = folder.with_name('moved'); folder.rename(moved)
    assert len(build_cache(moved, moved/'cache', 20).build(image_files(moved))) == 0 and len(seen) == 2, 'recognised by content'


def test_other_settings_are_other_caches(folder):
    a,b,c = (build_cache(folder, folder/'cache', *o) for o in ((20, 3), (24, 3), (20, 1)))
    assert len({o.folder for o in (a, b, c)}) == 3 and a[folder/'01.png'][0].shape == (20, 30, 3) and c[folder/'01.png'][0].shape == (20, 30)
    with pytest.raises(ValueError, match='1 channels, and in_chans is 3'): loaders(folder, decoded=c)
    with pytest.raises(ValueError, match='short side of 20, and decoded_side is 24'): loaders(folder, decoded=a, decoded_side=24)
    with pytest.raises(ValueError, match='decoded_side=24 is for decoded copies'): loaders(folder, decoded_side=24)
    with pytest.raises(ValueError, match='side=0'): DecodedImages(folder, 0)
    with pytest.raises(ValueError, match='in_chans=2'): DecodedImages(folder, 9, 2)
    (a.folder/'about.json').write_text('{"format": "another"}')
    with pytest.raises(CacheError, match="'another', where 'bootmae_nb decoded 1'"): DecodedImages(folder/'cache', 20)
    (folder/'file').touch()
    with pytest.raises(CacheError, match=r'cannot be read \(Not a directory\)'): build_cache(folder, folder/'file')


def test_images_in_memory_are_refused(folder):
    x = np.zeros((9, 9, 3), np.uint8)
    with pytest.raises(ValueError, match='item 1 is of type ndarray, which is in memory already'): loaders([folder/'01.png', x], decoded=folder/'cache')


def test_tables_and_labels_of_validation(folder):
    df = pd.DataFrame(dict(name=[o.name for o in sorted(folder.glob('*.png'))], valid=[i > 8 for i in range(12)]))
    kw = dict(fn_col='name', valid_col='valid', pref=folder)
    assert same(epoch(loaders(df, **kw).train), epoch(loaders(df, decoded=folder/'cache', decoded_side=60, **kw).train))


def test_the_packaged_photographs(tmp_path):
    dls = loaders('photos', decoded=tmp_path)
    assert len(dls.decoded) == len(sample_photos()) and epoch(dls.valid).shape == (1, 3, 16, 16)


# ---- bad files


def test_the_same_verdicts_and_reasons(tmp_path):
    cases = make_corpus(tmp_path)
    (plain,_),(fast,_) = (recorded(lambda kw=kw: loaders(tmp_path, **kw)) for kw in (dict(scan='full', cache=0), dict(decoded=tmp_path/'c', decoded_side=32)))
    assert plain.left_out == fast.left_out and len(fast.left_out) > 20
    c = fast.decoded
    for o in cases:
        if o.good and o.listed and str(o.path) not in fast.left_out:
            x = c[o.path][0]
            assert np.abs(x.astype(int) - o.pixels).max() <= o.tol if x.shape == o.pixels.shape else max(o.pixels.shape) > 32, o.name
    assert [len(epoch(o)) for o in fast] == [len(epoch(o)) for o in plain]
    built = recorded(lambda: build_cache(tmp_path, tmp_path/'c', 32))[0]
    assert built.left_out == fast.left_out
    with pytest.raises(ImageError): loaders(tmp_path, decoded=tmp_path/'c', decoded_side=32, on_bad='raise')


@pytest.mark.parametrize('orientation', range(1, 9))
def test_turned_images_are_drawn_upright(tmp_path, orientation):
    (tmp_path/'a.jpg').write_bytes(turned(orientation, 'jpeg'))
    x,full,reduces = build_cache(tmp_path, tmp_path/'c', 16)[tmp_path/'a.jpg']
    assert full == (48, 32) and x.shape == (16, 24, 3) and reduces


def test_smaller_limits_refuse_what_is_in_the_cache(folder):
    build_cache(folder, folder/'cache')
    dls,said = recorded(lambda: loaders(folder, decoded=folder/'cache', max_pixels=2000))
    assert len(said) == 1 and '8 of 12 images cannot be read' in said[0] and 'pixels, more than 2,000' in said[0]


def test_leaving_out_as_a_run_did(folder):
    (folder/'04.png').write_bytes(b'')
    dls,_ = recorded(lambda: loaders(folder, decoded=folder/'cache', leave_out=['01.png']))
    items = {o.name for o in [*dls.train_ds.items, *dls.valid_ds.items]}
    assert '04.png' in items and '01.png' not in items and len(dls.left_out) == 2
    for dl in dls: assert len(epoch(dl))


# ---- kills


class Power:
    "Ends the process at the n-th time that something is about to reach, or has just reached, the disk"
    def __init__(self, n): self.left = n
    def __call__(self, f):
        def g(*a):
            self.step(); res = f(*a); self.step()
            return res
        return g
    def step(self):
        self.left -= 1
        if self.left < 0: os.kill(os.getpid(), signal.SIGKILL)


def test_killed_at_any_moment(folder, tmp_path_factory):
    want = {o.name: np.asarray(open_image(o)) for o in folder.glob('*.png')}
    kills = 0
    for n in range(0, 60, 2):
        at = tmp_path_factory.mktemp('c')
        def build(n=n, at=at):
            power = Power(n)
            cache.os = type('os', (), dict(vars(os), fsync=staticmethod(power(os.fsync)), replace=staticmethod(power(os.replace))))
            cache._append,real = power(cache._append), DecodedImages._add
            DecodedImages._add = lambda self, missing, workers: real(self, missing, 0, at_once=5)
            build_cache(folder, at, 100)
        status = run_forked(build)
        if status == 0: break
        assert status == -signal.SIGKILL
        kills += 1
        if n % 4 and len(DecodedImages(at, 100)) < 12:                                 # and a torn write
            with open(at/'100px_rgb'/'index.jsonl', 'ab') as f: f.write(b'0123456789abcdef ["/half')
            with open(at/'100px_rgb'/'pixels', 'ab') as f: f.write(b'half')
        before = DecodedImages(at, 100)
        for o in before.names: assert np.array_equal(before[o][0], want[Path(o).name])
        after = build_cache(folder, at, 100)
        assert {Path(o).name: after[o][0].tobytes() for o in after.names} == {k: v.tobytes() for k,v in want.items()} and after.verify() == []
        assert after.n_bytes == sum(v.size for v in want.values()), 'nothing twice'
    assert 15 < kills < 30


def test_a_builder_with_workers_is_killed(photos, tmp_path):
    for i in range(300): shutil.copy(next(photos.glob('*.jpg')), tmp_path/f'{i}.jpg')
    for i,o in enumerate(tmp_path.glob('*.jpg')): o.write_bytes(o.read_bytes() + bytes([i % 256, i // 256]))
    pid = fork(lambda: DecodedImages(tmp_path/'c', 64).build(image_files(tmp_path), num_workers=2))
    index = tmp_path/'c'/'64px_rgb'/'index.jsonl'
    end = time.monotonic() + 60
    while not (index.exists() and index.stat().st_size) and time.monotonic() < end: time.sleep(.01)
    os.kill(pid, signal.SIGKILL); assert wait(pid) in (-signal.SIGKILL, 0)
    c = DecodedImages(tmp_path/'c', 64)
    n = len(c)
    assert 0 < n <= 300 and c.verify() == [] and c.build(image_files(tmp_path)) == {} and len(c) == 300


# ---- damage


def damaged(c, at=100, data=b'\xff\x00' * 8):
    with open(c.folder/'pixels', 'r+b') as f: f.seek(at); f.write(data)


@pytest.mark.parametrize('workers', [0, 1])
def test_damaged_pixels_are_never_trained_on(folder, workers):
    want = epoch(loaders(folder, decoded=folder/'cache', decoded_side=20).train)
    damaged(DecodedImages(folder/'cache', 20))
    dls = loaders(folder, decoded=folder/'cache', decoded_side=20, num_workers=workers, crops_per_image=2)
    x,said = recorded(lambda: epoch(dls.train))
    assert same(x, want)
    if not workers: assert any('00.png is damaged, its file is read instead' in o for o in said)
    c = DecodedImages(folder/'cache', 20)
    assert [Path(o).name for o in c.verify(repair=False)] == [Path(o).name for o in c.verify()] == ['00.png']
    assert c.verify() == [] and c.verify() == DecodedImages(folder/'cache', 20).verify()
    x,said = recorded(lambda: epoch(loaders(folder, decoded=folder/'cache', decoded_side=20).train))
    assert same(x, want) and said == []


def test_a_lost_end_and_damaged_lines_are_built_again(folder, monkeypatch):
    monkeypatch.setattr(data, '_SETTLED', -1)
    c = build_cache(folder, folder/'cache', 20); want = epoch(loaders(folder, decoded=folder/'cache', decoded_side=20).train)
    size = c.n_bytes
    os.truncate(c.folder/'pixels', size - 2500)
    seen = count(monkeypatch); build_cache(folder, folder/'cache', 20)
    assert len(seen) == 2 and build_cache(folder, folder/'cache', 20).verify() == []
    index = (c.folder/'index.jsonl').read_bytes()
    (c.folder/'index.jsonl').write_bytes(index[:40] + b'X' + index[41:])
    seen.clear(); dls = loaders(folder, decoded=folder/'cache', decoded_side=20)
    assert seen == ['00.png'] and same(epoch(dls.train), want) and dls.decoded.verify() == []
    (c.folder/'pixels').unlink(); seen.clear()
    assert same(epoch(loaders(folder, decoded=folder/'cache', decoded_side=20).train), want) and len(seen) == 12


def test_damage_whose_file_is_gone_is_told(folder):
    c = build_cache(folder, folder/'cache', 20)
    damaged(c); (folder/'00.png').unlink()
    bad,said = recorded(c.verify)
    assert len(bad) == 1 and '1 damaged images could not be decoded again' in said[0]


# ---- disk and company


def test_a_disk_that_is_too_small(folder, monkeypatch):
    monkeypatch.setattr(cache.shutil, 'disk_usage', lambda _: type('U', (), dict(free=10_000)))
    with pytest.raises(CacheError, match=r'needs about 0.00 GB for 12 decoded images, and 0.00 GB are free: make room'): build_cache(folder, folder/'cache')
    c = DecodedImages(folder/'cache', 20)
    assert abs(c.needed(sorted(folder.glob('*.png'))) - 12*20*29*3) < 1500
    c.build(sorted(folder.glob('*.png'))[:4]); assert len(c) == 4, 'which fits'


def test_a_disk_that_fills_up(folder, monkeypatch):
    real,left = cache._append, [7]
    def append(*a):
        left[0] -= 1
        if left[0] < 0: raise OSError(errno.ENOSPC, 'No space left on device')
        return real(*a)
    monkeypatch.setattr(cache, '_append', append)
    monkeypatch.setattr(DecodedImages, '_add', lambda self, missing, workers, add=DecodedImages._add: add(self, missing, 0, 4))
    with pytest.raises(CacheError, match=r'No space left on device') as e: build_cache(folder, folder/'cache')
    assert 'what it holds so far is whole' in str(e.value) and len(DecodedImages(folder/'cache')) == 4
    left[0] = 99
    c = build_cache(folder, folder/'cache'); assert len(c) == 12 and c.verify() == []


def test_two_builders_at_once(photos, tmp_path, capfd):
    def build():
        real = cache._decode
        cache._decode = lambda o, *a: (time.sleep(.05), print('decoded', Path(o).name, flush=True), real(o, *a))[2]
        c = build_cache(photos, tmp_path, 64, num_workers=0)
        assert len(c) == 8 and c.verify() == []
    pids = [fork(build) for _ in range(3)]
    assert [wait(o) for o in pids] == [0, 0, 0]
    out,err = capfd.readouterr()
    assert out.count('decoded ') == 8 and err.count(f'another process is decoding images into {tmp_path}/64px_rgb: waiting for it') == 2


def test_a_folder_that_may_only_be_read():
    folder = Path(tempfile.mkdtemp()); folder.chmod(0o755)
    try:
        for i in range(4): picture(i).save(folder/f'{i}.png')
        build_cache(folder, folder/'c', 20)
        want = epoch(loaders(folder, decoded=folder/'c', decoded_side=20).train)
        for o in [folder/'c', folder/'c'/'20px_rgb']: o.chmod(0o555)
        def use():
            if not os.geteuid(): os.setgid(65534); os.setuid(65534)
            assert same(epoch(loaders(folder, decoded=folder/'c', decoded_side=20).train), want)
            assert len(build_cache([*folder.glob('*.png')], folder/'c', 20)) == 4
        def lacks():
            if not os.geteuid(): os.setgid(65534); os.setuid(65534)
            try: loaders(folder, decoded=folder/'c', decoded_side=20)
            except CacheError as e: assert 'lacks 1 images' in str(e) and 'new.png' in str(e) and 'cannot be written to' in str(e)
            else: raise AssertionError('built where nothing may be written')
        assert run_forked(use) == 0
        picture(9).save(folder/'new.png')
        assert run_forked(lacks) == 0
    finally:
        for o in [folder/'c', folder/'c'/'20px_rgb']: o.chmod(0o755)
        shutil.rmtree(folder)


def test_the_files_say_what_they_are(folder):
    c = build_cache(folder, folder/'cache', 20)
    assert sorted(o.name for o in c.folder.iterdir() if o.name != 'lock') == ['about.json', 'index.jsonl', 'pixels']
    assert json.loads((c.folder/'about.json').read_text())['side'] == 20 and '12 images, 0.0 MB' in repr(c)
    with pytest.raises(KeyError): c[folder/'nothing.png']


@pytest.mark.slow
def test_the_command_makes_and_uses_one(folder, tmp_path_factory):
    at,env = tmp_path_factory.mktemp('run'), dict(os.environ, BOOTMAE_DEVICE='cpu', PYTHONWARNINGS='ignore::FutureWarning')
    def run(*args): return subprocess.run([Path(sys.executable).parent/'bootmae-train', *map(str, args)], capture_output=True, text=True, timeout=300, env=env)
    sizes = ['--arch', 'vit_tiny_patch16_224', '--img-size', '32', '--patch-size', '8', '--bs', '4', '--set', 'width=48', 'depth=2', 'heads=3', 'pixel_width=48']
    done = run(folder, *sizes, '--epochs', 2, '--crops', 2, '--decoded', at/'c', '--decoded-side', 36, '--out', at/'run')
    assert done.returncode == 0, done.stderr
    assert '% of the training time' in done.stdout and len(DecodedImages(at/'c', 36)) == 12
    shutil.move(at/'c', at/'d')
    done = run('--resume', at/'run', '--epochs', 3, '--allow-changes', '--decoded', at/'d')
    assert done.returncode == 0, done.stderr
    assert not (at/'c').exists() and json.loads((at/'run'/'run.json').read_text())['arguments']['decoded'] == str(at/'d')


# ---- waiting


def test_the_share_of_waiting_is_measured(folder):
    dls,wait = loaders(folder, bs=8), DataWait()
    learn = mim_learner(dls, method='mae', cbs=wait, metrics=wait.metric, **tiny)
    learn.one_batch = lambda i, b, real=learn.one_batch: (time.sleep(.05), real(i, b))
    quietly(learn, 'fit', 2, 1e-3)
    assert len(wait.shares) == 2 and 0 < wait.share < .7 and wait.took > .2 and learn.recorder.metric_names[-2] == 'data_wait'
    assert learn.recorder.values[-1][-1] == wait.shares[-1]
    share = wait.share; quietly(learn, 'validate')
    assert wait.share == share
    learn.dls.train.create_item = lambda s, real=learn.dls.train.create_item: (time.sleep(.05), real(s))[1]
    quietly(learn, 'fit', 1, 1e-3)
    assert wait.share > .7 and len(wait.shares) == 1


@pytest.mark.cuda
def test_the_device_resizes(photos, tmp_path):
    kw = dict(decoded=tmp_path, img_size=64)
    a = [loaders(photos, **kw), loaders(photos, device='cuda', **kw), loaders(photos, device='cuda', num_workers=2, **kw)]
    assert opener(a[1]).later and a[1].train.pin_memory
    for i in 0, 1:
        x,y,z = (epoch(o[i]) for o in a)
        assert y.is_cuda and (x - y.cpu()).abs().max() < .03 and (x - y.cpu()).abs().mean() < .003 and torch.equal(y, z)
    crops = torch.randint(0, 256, (4, 90, 80, 3), dtype=torch.uint8); box = torch.tensor([(1.5, 2, 70, 80.25, 80, 90, i % 2) for i in range(4)])
    want = resample_crops(crops, box, (32, 48))
    with torch.autocast('cuda', torch.bfloat16):
        args = crops.cuda(), box.cuda()
        torch.cuda.set_sync_debug_mode('error')
        try: got = resample_crops(*args, (32, 48))
        finally: torch.cuda.set_sync_debug_mode('default')
    assert torch.allclose(got.cpu(), want, atol=.01)
