"""Loaders for pretraining: everything follows from the seed, nothing leaks, bad files cost one line, any source will do."""
import importlib.util
import pickle
import random
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.block import DataBlock
from fastai.data.core import Datasets, TfmdDL
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.core import PILImageBW
from fastai.vision.data import ImageBlock, ImageDataLoaders
from fastai.torch_basics import Transform
from PIL import Image

import bootmae_nb.data as data
from bootmae_nb.data import CropImage, OpenImage, SeededDL, decode_side, mim_dls, seeded
from bootmae_nb.images import ImageError


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Twelve small pictures, each of one colour that tells which it is"
    path = tmp_path_factory.mktemp('images')
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 20, (40, 60, 3))
        (path/f'day{i % 3}').mkdir(exist_ok=True)
        Image.fromarray((noise + 20 * i).astype(np.uint8)).save(path/f'day{i % 3}'/f'{i}.png')
    return path


def loaders(source, **kwargs): return mim_dls(source, **dict(img_size=16, bs=4, num_workers=0, device='cpu', crops_per_image=2) | kwargs)
def batches(dl): return [b[0] for b in dl]
def epoch(dl): return torch.cat(batches(dl))
def same(a, b): return a.shape == b.shape and torch.equal(a, b)


# ---- randomness


def test_workers_change_nothing(folder):
    a, b = loaders(folder, seed=3), loaders(folder, seed=3, num_workers=2)
    for _ in range(2): assert same(epoch(a.train), epoch(b.train))
    assert same(epoch(a.valid), epoch(b.valid))


def draws(i): return torch.tensor([i, random.random(), np.random.rand(), torch.rand(1).item()])


def test_all_three_generators_and_the_order_follow_from_seed_and_epoch():
    make = lambda seed, n=0: SeededDL(Datasets(list(range(20)), [draws]), bs=4, shuffle=True, num_workers=n, seed=seed)
    a, b, c = make(1), make(1, 2), make(2)
    a0, a1, c0 = epoch(a), epoch(a), epoch(c)
    assert same(a0, epoch(b)) and same(a1, epoch(b)) and a0[:, 0].sort()[0].tolist() == list(range(20))
    for other in a1, c0:
        assert not same(a0[:, 0], other[:, 0])
        for k in 1, 2, 3: assert not set(a0[:, k].tolist()) & set(other[:, k].tolist())
    assert same(epoch(a.new()), epoch(a)), 'a new loader goes on from the same epoch and seed'
    assert (c.new().seed, c.new().epoch, c.new(seed=5).seed) == (2, 0, 5)


def test_seeds_and_epochs_differ(folder):
    a, b = loaders(folder, seed=3), loaders(folder, seed=4)
    a0, a1 = epoch(a.train), epoch(a.train)
    assert not same(a0, a1) and not same(a0, epoch(b.train))
    assert loaders(folder, seed=3).train_ds.items == a.train_ds.items


def test_the_same_image_is_cropped_anew_in_every_epoch_and_repeat(folder):
    dls = loaders(folder, crops_per_image=30, valid_pct=0.9, bs=30)
    crops = torch.cat([epoch(dls.train), epoch(dls.train)]).flatten(1)
    assert len(crops.unique(dim=0)) == len(crops)


def test_validation_never_changes(folder):
    dls = loaders(folder, valid_pct=.5)
    first = epoch(dls.valid); epoch(dls.train)
    assert same(first, epoch(dls.valid)) and same(first[:4], dls.valid.one_batch()[0])


def test_looking_is_not_training(folder):
    looked, trained = loaders(folder), loaders(folder)
    seen = looked.train.one_batch()[0]; looked.show_batch(show=False); looked.train.show_batch(unique=True, show=False)
    assert looked.train.epoch == -1
    assert same(seen, batches(trained.train)[0]) and same(epoch(looked.train), epoch(loaders(folder).train))


def test_any_epoch_can_be_gone_back_to(folder):
    dl = loaders(folder).train
    passes = [epoch(dl) for _ in range(3)]
    dl.epoch = 0
    assert same(epoch(dl), passes[1]) and same(epoch(dl.new(epoch=1)), passes[2])


def test_unique_shows_different_crops_of_one_image(folder):
    dl = loaders(folder, flip=False).train
    x = dl.show_batch(unique=True, show=False, max_n=4)[0]
    assert len(x.flatten(1).unique(dim=0)) == 4
    assert x.flatten(1).float().mean(1).std() < 5, 'all crops are of the same flat picture'



def state(): return random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2:], torch.get_rng_state().tolist()


def test_global_generators_are_left_alone(folder):
    np.random.randn()  # leaves a second normal number waiting in numpy's generator
    before = state()
    dls = loaders(folder); dls.show_batch(show=False)
    for dl in dls: epoch(dl)
    for _ in dls.train: break
    with pytest.raises(ZeroDivisionError), seeded(1): raise ZeroDivisionError
    assert state() == before


def test_the_consumer_of_a_batch_draws_from_its_own_numbers(folder):
    torch.manual_seed(0); want = torch.rand(3)
    torch.manual_seed(0)
    assert same(torch.cat([torch.rand(1) for _, _ in zip(range(3), loaders(folder).train)]), want)


@pytest.mark.cuda
def test_the_generator_of_the_device_is_borrowed_too():
    device = torch.device('cuda', 0); draw = lambda: torch.rand(3, device=device).tolist()
    torch.cuda.manual_seed(0); want = draw()
    torch.cuda.manual_seed(0)
    with seeded(1, device=device): a = draw()
    assert draw() == want
    with seeded(1, device=device): assert draw() == a != want


class Noise(Transform):
    "A batch transform that draws from the global generator, and one that wants to know the epoch"
    order = 99
    def __init__(self): super().__init__(); self.calls = []
    def encodes(self, x: torch.Tensor): return x + torch.rand(1)
    def restart(self, seed, epoch, i): self.calls.append((seed, epoch, i))


def test_batch_transforms_are_seeded_and_restarted(folder):
    dls = [loaders(folder, seed=5) for _ in range(2)]; noise = Noise()
    for o in dls: o.train.after_batch.add(noise); o.valid.after_batch.add(noise)
    a, b = (epoch(o.train) for o in dls)
    assert same(a, b); epoch(dls[0].train); epoch(dls[0].valid)
    assert noise.calls == [(5, 0, 0), (5, 0, 0), (5, 1, 0), (5, 0, 0)]
    assert same(epoch(dls[0].valid), epoch(dls[1].valid)) and same(epoch(dls[0].valid), epoch(dls[0].valid)) and dls[0].valid.epoch == -1


def test_one_pass_moves_nothing(folder):
    a, b = loaders(folder), loaders(folder)
    a.train.after_batch.add(Noise()); b.train.after_batch.add(Noise())
    before = state(); a.train._types = None; a.train._one_pass()
    assert state() == before and a.train.epoch == -1 and same(epoch(a.train), epoch(b.train))


def test_fastai_loaders_can_be_converted(folder):
    files = sorted(folder.rglob('*.png'))
    dls = ImageDataLoaders.from_lists(folder, files, [o.parent.name for o in files], bs=4, item_tfms=Resize(24), device='cpu',
                                      batch_tfms=aug_transforms(max_lighting=.5), num_workers=0)
    make = lambda **kw: dls.train.new(cls=SeededDL, seed=1, **kw)
    dl = make()
    assert isinstance(dl, SeededDL) and dl.shuffle and dl.drop_last and dl.bs == 4 and dl.n_inp == 1
    for a, b in zip([*dl, *dl], [*(w := make(num_workers=2)), *w]): assert same(a[0], b[0]) and same(a[1], b[1])
    assert not same(next(iter(make()))[0], next(iter(dls.train.new(cls=SeededDL, seed=2)))[0])
    assert isinstance(dl.new(cls=TfmdDL), TfmdDL) and not isinstance(dl.new(cls=TfmdDL), SeededDL)


def test_a_data_block_can_use_it(folder):
    block = DataBlock(ImageBlock, get_items=lambda path: sorted(path.rglob('*.png')), item_tfms=Resize(16), n_inp=1,
                      splitter=lambda o: (range(8), range(8, 12)))
    a, b = (block.dataloaders(folder, bs=4, dl_type=SeededDL, seed=1, num_workers=n, device='cpu') for n in (0, 2))
    assert all(isinstance(o, SeededDL) for o in (*a, *b)) and same(epoch(a.train), epoch(b.train)) and a.valid.seed == 1


def test_processes_share_an_epoch(folder, monkeypatch):
    if not importlib.util.find_spec('accelerate'):  # fastai's module for several processes needs its name only
        monkeypatch.setitem(sys.modules, 'accelerate', types.SimpleNamespace(Accelerator=type('Accelerator', (), {})))
    from fastai.distributed import DistributedDL
    monkeypatch.setattr(DistributedDL, '_broadcast', lambda self, t, rank: list(t))
    dls = [loaders(folder, bs=1).train for _ in range(3)]
    ranks = [DistributedDL(o, rank=r, world_size=2) for r, o in enumerate(dls[:2])]
    for n in range(2):
        parts = {o.numpy().tobytes() for r in ranks for o in epoch(r)}
        whole = {o.numpy().tobytes() for o in epoch(dls[2])}
        assert whole == parts and len(whole) == 22 and [o.epoch for o in dls] == [n] * 3


# ---- images


def test_batches_are_plain_images_between_0_and_1(folder):
    dls = loaders(folder)
    b = dls.one_batch()
    assert isinstance(b, tuple) and len(b) == 1 and dls.n_inp == 1 and type(b[0]).__name__ == 'TensorImage'
    assert b[0].shape == (4, 3, 16, 16) and b[0].dtype == torch.float32 and 0 <= b[0].min() < b[0].max() <= 1


@pytest.mark.parametrize('channels,mode', [(1, 'L'), (3, 'RGB'), (4, 'RGBA')])
def test_channels_and_shapes(folder, channels, mode):
    dls = loaders(folder, in_chans=channels, img_size=(16, 32))
    assert dls.one_batch()[0].shape == (4, channels, 16, 32) and dls.valid.one_batch()[0].shape[1:] == (channels, 16, 32)
    assert dls.train_ds[0][0].mode == mode
    dls.show_batch(max_n=3)


def test_grey_is_drawn_as_a_positive(folder):
    import matplotlib.pyplot as plt
    _, ax = plt.subplots()
    dls = loaders([np.full((20, 20), 60, np.uint8) for _ in range(3)], in_chans=1)
    dls.show_batch(max_n=1, ctxs=[ax])
    assert abs(ax.images[0].to_rgba(ax.images[0].get_array())[0, 0, 0] - 60 / 255) < .02


def ellipse(h, w): y, x = np.mgrid[:h, :w]; return ((((y - h / 2)**2 + (x - w / 2)**2) < (min(h, w) * .35)**2) * 255).astype(np.uint8)


@pytest.mark.parametrize('shape', [(100, 300), (300, 100), (100, 100)])
@pytest.mark.parametrize('size', [(64, 64), (64, 128), (128, 64)])
def test_validation_crops_the_centre_without_squashing(shape, size):
    x = loaders([ellipse(*shape), ellipse(*shape)], img_size=size, in_chans=1).valid.one_batch()[0][0, 0] > .5
    h, w = x.any(1).sum(), x.any(0).sum()
    scale = min(shape[0] / size[0], shape[1] / size[1])
    assert abs(h - min(.7 * min(shape) / scale, size[0])) <= 2 and abs(w - min(.7 * min(shape) / scale, size[1])) <= 2
    assert same(x, x.flip(0)) or (x ^ x.flip(0)).float().mean() < .03, 'centred'


def test_random_crops_keep_the_range_of_proportions():
    crop = CropImage((32, 96), .2); im = data.PILImage(Image.new('RGB', (900, 300)))
    stretch, area = [], []
    for i in range(300):
        with seeded(i): crop.before_call(im, 0)
        w, h = crop.cp_size
        stretch.append(w / h / 3); area.append(w * h / 270_000)
    assert .74 < min(stretch) < .85 and 1.2 < max(stretch) < 1.35 and .19 < min(area) < .25 and max(area) > .7


@pytest.mark.parametrize('shape', [(1, 1), (1, 50), (50, 1), (2, 3), (700, 1)])
def test_tiny_images(shape):
    dls = loaders([np.full(shape, 200, np.uint8) for _ in range(3)], img_size=(16, 48), crops_per_image=40)
    for dl in dls: assert (epoch(dl) - 200 / 255).abs().max() < 1e-6, 'no padding'


def test_half_of_the_crops_are_mirrored():
    x = np.zeros((30, 40), np.uint8); x[:, 20:] = 255
    left = lambda **kw: np.mean([o[0, :, :8].mean() > .5 for o in epoch(loaders([x, x + 0], crops_per_image=300, min_scale=1, bs=300, **kw).train)])
    assert .4 < left() < .6 and left(flip=False) == 0


@pytest.mark.parametrize('size,scale', [((224, 224), .2), ((64, 256), .3), ((96, 48), 1.)])
def test_reduced_decoding_never_costs_resolution(size, scale):
    side = decode_side(size, scale); crop = CropImage(size, scale)
    for w, h in (side, side), (side, 3 * side), (2 * side, side):
        im = data.PILImage(Image.new('RGB', (w, h)))
        for i in range(50):
            with seeded(i): crop.before_call(im, i % 2)
            assert crop.cp_size[0] >= size[1] - 1 and crop.cp_size[1] >= size[0] - 1


# ---- sources


def test_the_packaged_photographs():
    dls = mim_dls(img_size=16, device='cpu', num_workers=0)
    assert len(set(dls.train_ds.items)) == 10 and len(dls.valid_ds) == 1 and 480 <= len(dls.train_ds) <= 540 and dls.path == Path('.')
    assert len(set(mim_dls('photos', img_size=16, in_chans=1, device='cpu').train_ds.items)) == 16


def test_a_folder_named_photos_is_asked_about(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path); (tmp_path/'photos').symlink_to(folder)
    with pytest.raises(ValueError, match="write None or './photos'"): mim_dls('photos')
    assert len(set(loaders('./photos').train_ds.items)) == 11


def test_crops_per_image(folder):
    assert len(loaders(folder, crops_per_image=None).train_ds) == 11 * 47
    assert len(loaders(folder, crops_per_image=3).train_ds) == 33 and len(loaders(folder, crops_per_image=3).valid_ds) == 1
    many = [np.zeros((4, 4), np.uint8)] * 1
    assert len(loaders([o.copy() for o in many * 600], crops_per_image=None, scan=False).train_ds) == 540


def test_no_crop_of_a_validation_image_is_trained_on(folder):
    for seed in range(5):
        dls = loaders(folder, valid_pct=.3, seed=seed)
        train, valid = set(dls.train_ds.items), set(dls.valid_ds.items)
        assert len(train) == 8 and len(valid) == 4 and not train & valid
    files = sorted(folder.rglob('*.png'))
    dls = loaders(files + [str(o) for o in files], valid_pct=.3)
    assert not {str(o) for o in dls.train_ds.items} & {str(o) for o in dls.valid_ds.items}


def test_lists_of_anything(folder):
    files = sorted(folder.rglob('*.png')); images = [Image.open(o) for o in files]; arrays = [np.asarray(o) for o in images]
    want = epoch(loaders(files).train)
    mixed = [files[0], str(files[1]), images[2], *arrays[3:]]
    for source in map(str, files), images, arrays, np.stack(arrays), mixed: assert same(epoch(loaders(source).train), want)
    assert same(epoch(loaders([o.relative_to(folder) for o in files], pref=folder).train), want)
    assert loaders(files).path == Path('.') and loaders(str(folder)).path == folder


def test_tables(folder):
    df = pd.DataFrame(dict(split=[i > 8 for i in range(12)], file=[str(o.relative_to(folder)) for o in sorted(folder.rglob('*.png'))]))
    dls = loaders(df, fn_col='file', valid_col='split', pref=folder)
    assert list(dls.valid_ds.items) == [folder/o for o in df.file[9:]] and set(dls.train_ds.items) == {folder/o for o in df.file[:9]}
    assert same(epoch(loaders(df, fn_col=1, valid_col=0, pref=folder).train), epoch(dls.train)) and dls.path == folder
    drawn = loaders(df, fn_col='file', pref=folder)
    assert len(drawn.valid_ds) == 1


def test_one_image_serves_for_both_and_says_so(folder):
    file = sorted(folder.rglob('*.png'))[0]
    with pytest.warns(UserWarning, match='there is one image only'): dls = loaders(file)
    assert list(dls.valid_ds.items) == [file] and len(epoch(dls.train)) == 2 and dls.path == file.parent
    with pytest.warns(UserWarning, match='valid_pct is 0'): dls = loaders(folder, valid_pct=0)
    assert len(set(dls.train_ds.items)) == 12 and len(dls.valid_ds) == 4


def test_a_batch_larger_than_the_data(folder):
    dls = loaders(folder, bs=100)
    assert [len(o) for o in batches(dls.train)] == [22] and len(dls.train) == 1
    assert [len(o) for o in batches(loaders(folder, bs=8).train)] == [8, 8]


# ---- bad files


@pytest.fixture
def spoilt(folder, tmp_path):
    "Four good pictures, and files that their header or only their body gives away"
    for i, o in enumerate(sorted(folder.rglob('*.png'))[:4]): (tmp_path/f'good{i}.png').write_bytes(o.read_bytes())
    whole = (tmp_path/'good0.png').read_bytes()
    (tmp_path/'half.png').write_bytes(whole[:len(whole) // 2])
    (tmp_path/'empty.png').touch()
    return tmp_path


def recorded(f):
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        return f(), [str(o.message) for o in w if issubclass(o.category, UserWarning)]


def test_bad_files_are_reported_once_and_left_out(spoilt):
    dls, said = recorded(lambda: loaders(spoilt))
    assert len(said) == 1 and said[0].startswith('2 of 6 images') and 'half.png' in said[0] and 'empty.png' in said[0]
    assert all(o.name.startswith('good') for o in [*dls.train_ds.items, *dls.valid_ds.items])
    assert recorded(lambda: [epoch(o) for o in dls])[1] == []


def test_many_bad_files_are_counted(tmp_path, folder):
    for i in range(20): (tmp_path/f'{i}.jpg').touch()
    Image.new('RGB', (9, 9)).save(tmp_path/'a.png'); Image.new('RGB', (9, 9)).save(tmp_path/'b.png')
    (said,) = recorded(lambda: loaders(tmp_path))[1]
    assert said.startswith('20 of 22') and 'and 15 more' in said and said.count('\n') == 6


def test_marks_of_a_table_stay_with_their_rows(spoilt):
    names = ['empty.png', 'good0.png', 'half.png', 'good1.png', 'good2.png']
    df = pd.DataFrame(dict(name=names, valid=[True, False, False, True, False]))
    dls, _ = recorded(lambda: loaders(df, pref=spoilt, valid_col='valid'))
    assert [o.name for o in dls.valid_ds.items] == ['good1.png'] and {o.name for o in dls.train_ds.items} == {'good0.png', 'good2.png'}


def test_raise_names_the_file(spoilt):
    with pytest.raises(ImageError, match='empty.png is empty'): loaders(spoilt, on_bad='raise')
    dls = recorded(lambda: loaders(spoilt, on_bad='raise', scan=False, valid_pct=.2))[0]
    with pytest.raises(ImageError, match='half.png|empty.png'): [epoch(o) for o in dls]
    dls = loaders(spoilt, on_bad='raise', scan=False, num_workers=1)
    with pytest.raises(ImageError, match='half.png|empty.png'): [epoch(o) for o in dls]


def test_a_file_that_turns_out_bad_in_training_is_replaced(spoilt):
    (spoilt/'empty.png').unlink()
    make = lambda n: loaders(spoilt, cache=0, crops_per_image=6, valid_pct=.2, num_workers=n)
    dls, said = recorded(lambda: make(0))
    assert said == [], 'its header is fine'
    (a, b), said = recorded(lambda: (epoch(dls.train), epoch(dls.train)))
    assert len(said) == 1 and 'half.png' in said[0] and len(a) == len(b) == 24
    assert same(a, recorded(lambda: epoch(make(0).train))[0])


def test_workers_complain_once_in_all_epochs(spoilt, capfd, monkeypatch):
    (spoilt/'empty.png').unlink()
    monkeypatch.setattr(warnings, 'showwarning', lambda message, *args, **kwargs: print(message, file=sys.stderr))
    warnings.simplefilter('always')
    dls = loaders(spoilt, cache=0, crops_per_image=6, valid_pct=.2, num_workers=1)
    first, second = epoch(dls.train), epoch(dls.train)
    assert len(first) == len(second) == 24 and capfd.readouterr().err.count('half.png') == 1


def test_predictions_are_never_for_another_image(spoilt):
    dls, _ = recorded(lambda: loaders(spoilt))
    with pytest.raises(ImageError, match='half.png'): epoch(dls.test_dl([spoilt/'good0.png', spoilt/'half.png']))
    assert dls.test_dl([spoilt/'good0.png']).on_bad == 'raise' and dls.train.new().on_bad == 'skip'


def test_nothing_readable(spoilt):
    for o in spoilt.glob('good*'): o.unlink()
    with pytest.raises(ImageError, match='none of the 2 images can be read.*empty.png'): loaders(spoilt)
    dls = loaders(spoilt, scan=False)
    with pytest.raises(ImageError, match='none of the'), pytest.warns(UserWarning): epoch(dls.train)


@pytest.mark.parametrize('kwargs,problem', [
    (dict(in_chans=2), 'in_chans=2'), (dict(in_chans=5), 'choose 1'), (dict(bs=0), 'bs=0'), (dict(img_size=0), 'img_size=0'),
    (dict(img_size=(8, -8)), 'img_size'), (dict(img_size=(8, 8, 8)), 'img_size'), (dict(img_size=9.5), 'img_size'),
    (dict(valid_pct=1), 'valid_pct=1'), (dict(valid_pct=-.1), 'outside'), (dict(on_bad='ignore'), 'on_bad'),
    (dict(crops_per_image=0), 'crops_per_image=0'), (dict(min_scale=0), 'min_scale=0'), (dict(source=3), 'int is no source'),
    (dict(source=[]), 'is empty'), (dict(source='/no/such/folder'), 'does not exist'),
    (dict(source=pd.DataFrame({'a': ['x.png']}), fn_col='b'), "no column 'b'"), (dict(source=pd.DataFrame({'a': ['x']}), fn_col=1), 'no column 1'),
    (dict(source=pd.DataFrame({'a': ['x.png', None]})), 'row 1'),
    (dict(source=pd.DataFrame({'a': ['x'], 'v': ['yes']}), valid_col='v'), 'True and False'),
    (dict(source=[np.zeros((4, 4))] * 2, max_pixels=15), '4 x 4 pixels, more than 15')])
def test_wrong_arguments_get_one_sentence(kwargs, problem):
    with pytest.raises((ValueError, TypeError), match=problem) as e: mim_dls(**kwargs)
    assert '\n' not in str(e.value)


def test_wrong_sources_get_one_sentence(tmp_path, folder):
    with pytest.raises(ImageError, match='holds no images'): mim_dls(tmp_path)
    for name, problem in ('a.zip', 'unpack it'), ('a.csv', 'read it with pandas'):
        (tmp_path/name).touch()
        with pytest.raises(ValueError, match=problem): mim_dls(tmp_path/name)
    df = pd.DataFrame(dict(a=[str(o) for o in folder.rglob('*.png')], v=False))
    with pytest.raises(ValueError, match="'v' leaves no readable image for validation"): mim_dls(df, valid_col='v')


# ---- memory and files


def count_opened(monkeypatch):
    opened, real = [], data.open_image
    monkeypatch.setattr(data, 'open_image', lambda *a, **kw: (opened.append(a[0]), real(*a, **kw))[1])
    return opened


def test_small_sources_are_decoded_once(folder, monkeypatch):
    opened = count_opened(monkeypatch)
    dls = loaders(folder); cached = epoch(dls.train); epoch(dls.train); epoch(dls.valid)
    assert len(opened) == 12
    n_bytes = 12 * 40 * 60 * 4
    epoch(loaders(folder, cache=n_bytes).train)
    assert len(opened) == 24
    dls = loaders(folder, cache=n_bytes - 1)
    assert len(opened) == 24 and same(epoch(dls.train), cached) and len(opened) > 24


def test_pickles_carry_no_images(folder):
    dls = loaders(folder)
    assert len(dls.train_ds.tls[0].tfms.fs[0].decoded) == 12
    small = pickle.dumps(dls.new_empty())
    assert pickle.loads(small).train_ds.tls[0].tfms.fs[0].decoded == {} and len(pickle.dumps(OpenImage())) < 1000
    empty, files = pickle.loads(small), list(folder.rglob('*.png'))[:3]
    assert same(epoch(empty.test_dl(files)), epoch(dls.test_dl(files)))
    assert same(epoch(pickle.loads(pickle.dumps(dls)).train), epoch(dls.train))


def test_test_loaders_take_anything(folder):
    file = sorted(folder.rglob('*.png'))[5]; im = Image.open(file)
    for channels in 1, 3, 4:
        dls = loaders(folder, in_chans=channels)
        x = epoch(dls.test_dl([file, str(file), file.read_bytes(), im, np.asarray(im)]))
        assert x.shape == (5, channels, 16, 16) and (x == x[:1]).all()
    grey = loaders(folder).test_dl([PILImageBW(Image.new('L', (30, 30), 9))])
    assert epoch(grey).shape == (1, 3, 16, 16) and type(grey.one_batch()[0]).__name__ == 'TensorImage'


def test_seeded_works_on_any_dataset():
    dl = SeededDL(Datasets(list(range(6)), [lambda i: torch.rand(1) + i]), bs=2, num_workers=0, shuffle=True)
    assert len(dl) == 3 and torch.cat([b[0] for b in dl]).shape == (6, 1)
