"""Properties that must hold for any input: files with any damage, masks of any shape, checkpoints with anything in them. The examples are the same in every run."""
import math
import os
import pickle
import struct
import tempfile
import time
import warnings
import zipfile
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bootmae_nb.checkpoints import CheckpointError, from_authors, load_model, load_weights, read_file, save_model, to_authors
from bootmae_nb.data import mim_dls
from bootmae_nb.images import FORMATS, ImageError, image_size, open_image
from bootmae_nb.learner import mim_learner
from bootmae_nb.masking import BlockMask, FixedMask, GridMask, NoiseMask, RandomMask, mask_kinds
from bootmae_nb.models import mim_model
from common import equal, quietly, state
from corpus import encode, png_header, tiled_tiff

try: import resource
except ImportError: resource = None  # not on Windows

settings.register_profile('same', derandomize=True, deadline=None, database=None, print_blob=False,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much])
fixed = settings.get_profile('same')


# ---- damage


def edit(data, edits, others):
    "The bytes after some edits: (kind, place 0..1, number, length)"
    data = bytearray(data)
    for kind, place, number, length in edits:
        at = int(place**3 * len(data)) if number % 2 else int(place * len(data))  # half of the edits near the start, where the headers are
        raw = number.to_bytes(8, 'big')[:length % 8 + 1]
        if kind == 'flip' and data: data[min(at, len(data) - 1)] ^= 1 << number % 8
        if kind == 'set': data[at:at + len(raw)] = raw
        if kind == 'insert': data[at:at] = raw * (length + 1)
        if kind == 'drop': del data[at:at + length + 1]
        if kind == 'cut': del data[at:]
        if kind == 'size': data[at:at + 4] = struct.pack('<>'[number % 2] + 'I', (0, 1, 2**16 - 1, 2**31 - 1, 2**32 - 1, 20_000, 70_000)[number % 7])
        if kind == 'splice': other = others[number % len(others)]; data[max(at, 1):] = other[int(place * len(other)):]      # never a whole other file
        if kind == 'repeat': data[at:at] = data[at:at + 16 * length]
        if kind == 'checksums': data = with_checksums(data)
    return bytes(data)


def with_checksums(data):
    "A PNG whose checksums fit what has become of it, so that damage gets further"
    at = 8
    while at + 12 <= len(data):
        n = int.from_bytes(data[at:at + 4], 'big')
        if at + 12 + n > len(data): break
        data[at + 8 + n:at + 12 + n] = struct.pack('>I', zlib.crc32(data[at + 4:at + 8 + n]))
        at += 12 + n
    return data


def edits(*kinds, most=4):
    return st.lists(st.tuples(st.sampled_from(kinds), st.floats(0, 1), st.integers(0, 2**64 - 1), st.integers(0, 40)), min_size=1, max_size=most)


# ---- images


def image_seeds():
    "A small image in every format, and in the variants that are decoded by other code"
    im = Image.effect_noise((24, 20), 80).convert('RGB'); grey = im.convert('L')
    exif = Image.Exif(); exif[0x0112] = 6; exif[0x010e] = 'a picture'
    film = dict(save_all=True, append_images=[im.transpose(Image.Transpose.ROTATE_180)], duration=40)
    deep, real = Image.fromarray(np.arange(480, dtype=np.uint16).reshape(20, 24)*100), Image.fromarray(np.random.default_rng(0).random((20, 24), np.float32))
    res = dict(png=encode(im), png_exif=encode(im, exif=exif), png_palette=encode(im.quantize(16), transparency=3),
               png_deep=encode(deep), png_alpha=encode(im.convert('LA')), png_bits=encode(grey.convert('1')), apng=encode(im, **film),
               jpeg=encode(im, 'jpeg', exif=exif), jpeg_grey=encode(grey, 'jpeg'), jpeg_cmyk=encode(im.convert('CMYK'), 'jpeg'),
               jpeg_progressive=encode(im, 'jpeg', progressive=True), mpo=encode(im, 'mpo', save_all=True, append_images=[im]),
               gif=encode(im.quantize(32), 'gif'), gif_film=encode(im, 'gif', **film),
               webp=encode(im, 'webp'), webp_lossless=encode(im.convert('RGBA'), 'webp', lossless=True, exif=exif), webp_film=encode(im, 'webp', **film),
               bmp=encode(im, 'bmp'), bmp_palette=encode(im.quantize(16), 'bmp'), ppm=encode(im, 'ppm'), pgm=encode(grey, 'ppm'), text_ppm=b'P3 2 2 255 ' + b'1 2 3 '*4,
               pfm=encode(real, 'ppm'), jp2=encode(im, 'jpeg2000'), jp2_tiles=encode(im, 'jpeg2000', tile_size=(16, 16)), avif=encode(im, 'avif', speed=10),
               avif_film=encode(im, 'avif', speed=10, **film), tif=encode(im, 'tiff', exif=exif), tif_deep=encode(deep, 'tiff'), tif_real=encode(real, 'tiff'),
               tif_tiles=tiled_tiff(16, 16), tif_pages=encode(im, 'tiff', **film), tif_lab=encode(im.convert('LAB'), 'tiff'), bomb=png_header(20_000, 20_000))
    for how in 'tiff_lzw', 'tiff_adobe_deflate', 'jpeg', 'packbits': res[f'tif_{how}'] = encode(im, 'tiff', compression=how)
    return res


SEEDS = image_seeds()
IMAGE_EDITS = edits('flip', 'set', 'insert', 'drop', 'cut', 'size', 'splice', 'repeat', 'checksums')
LIMIT = 2**20  # pixels


def memory_limit(spare):
    "Whatever asks for more than `spare` bytes above what is in use fails inside"
    class Limit:
        def __enter__(self):
            if not Path('/proc/self/statm').exists(): return
            self.was = resource.getrlimit(resource.RLIMIT_AS)
            used = int(Path('/proc/self/statm').read_text().split()[0])*os.sysconf('SC_PAGE_SIZE')
            resource.setrlimit(resource.RLIMIT_AS, (used + spare, self.was[1]))
        def __exit__(self, *_):
            if hasattr(self, 'was'): resource.setrlimit(resource.RLIMIT_AS, self.was)
    return Limit()


def check_image(path, outcomes=None):
    "An RGB image of a sane size, or one sentence that names the file; no warnings, little time"
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        try: size = image_size(path, max_pixels=LIMIT)
        except ImageError: size = None
        try: im = open_image(path, max_pixels=LIMIT)
        except ImageError as e:
            im, why = None, str(e)
            assert why.startswith(f'{path} ') and why.isprintable() and len(why) < len(str(path)) + 300, why
            assert 'does not fit in memory' not in why
    assert im is not None or why
    if im is not None:
        assert im.mode == 'RGB' and im.width*im.height <= LIMIT and max(im.size) <= 1000*min(im.size) and im.info == {}
        assert size in (im.size, im.size[::-1]), 'the header told another size'
        assert len(im.tobytes()) == 3*im.width*im.height
    assert not said, [str(o.message) for o in said]
    assert time.perf_counter() - start < 10
    if outcomes is not None: outcomes.append(im is not None)


def test_the_seeds_cover_every_format_and_are_whole():
    found = {Image.open(BytesIO(o)).format for k, o in SEEDS.items() if k != 'bomb'}
    assert {'JPEG' if o == 'MPO' else o for o in found} == set(FORMATS)
    for k, o in SEEDS.items():
        if k != 'bomb': open_image(o)


def test_any_damage_gives_an_image_or_one_sentence():
    "3,000 damaged files of all formats, with 2 GB to spare, of which the threads of decoders reserve a part"
    folder, outcomes, names = Path(tempfile.mkdtemp()), [], list(SEEDS)

    @settings(fixed, max_examples=3000)
    @given(seed=st.sampled_from(names), what=IMAGE_EDITS)
    def check(seed, what):
        path = folder/'damaged.img'
        path.write_bytes(edit(SEEDS[seed], what, [SEEDS[o] for o in names]))
        check_image(path, outcomes)

    with memory_limit(2*2**30): check()
    path = folder/'damaged.img'; path.unlink(); folder.rmdir()
    assert len(outcomes) >= 3000 and .1 < np.mean(outcomes) < .9, 'most damage is of one kind'


def sized(fmt, w, h):
    "The header of a file that declares any size"
    riff = lambda body: b'RIFF' + struct.pack('<I', len(body) + 4) + b'WEBP' + body
    if fmt == 'png': return png_header(w, h)
    if fmt == 'gif': return b'GIF89a' + struct.pack('<HHBBB', w, h, 0, 0, 0) + b',' + struct.pack('<HHHHB', 0, 0, w, h, 0) + b'\2\2L\1\0;'
    if fmt == 'bmp': return b'BM' + struct.pack('<IIIIiiHHIIiiII', 1000, 0, 54, 40, w, h, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(100)
    if fmt == 'webp': return riff(b'VP8X' + struct.pack('<IB', 10, 0)[:8] + bytes(3) + struct.pack('<I', w - 1)[:3] + struct.pack('<I', h - 1)[:3] + bytes(99))
    if fmt == 'ppm': return b'P6 %d %d 255\n' % (w, h) + bytes(100)
    if fmt == 'jpeg':
        data = bytearray(SEEDS['jpeg_grey']); at = data.index(b'\xff\xc0')
        data[at + 5:at + 9] = struct.pack('>HH', h % 2**16, w % 2**16)
        return bytes(data)
    tags = [(256, w), (257, h), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, h), (279, 100)]
    return b'II*\0' + struct.pack('<IH', 8, len(tags)) + b''.join(struct.pack('<HHII', t, 4, 1, v) for t, v in tags) + bytes(104)


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='limits of memory are those of Linux')
def test_a_bomb_of_any_format_and_size_is_refused_by_its_header():
    "With 100 MB to spare, where decoding any of them would take 200 MB and more"
    @settings(fixed, max_examples=150)
    @given(fmt=st.sampled_from(['png', 'gif', 'bmp', 'webp', 'ppm', 'jpeg', 'tiff']), w=st.integers(8200, 65_000), h=st.integers(8200, 65_000))
    def check(fmt, w, h):
        for f in open_image, image_size:
            with pytest.raises(ImageError, match='^it ') as e: f(sized(fmt, w, h), name='it')
            assert 'memory' not in str(e.value)
            if fmt != 'webp': assert 'pixels' in str(e.value), fmt
    with memory_limit(100*2**20): check()


# ---- masks


KINDS = dict(random=lambda r, c, b: RandomMask(r), grid=lambda r, c, b: GridMask(c), low=lambda r, c, b: NoiseMask(r, 'low', .4 + 2*b),
             high=lambda r, c, b: NoiseMask(r, 'high'), band=lambda r, c, b: NoiseMask(r, 'band', (.3 + b, 1.5 + b)), stop=lambda r, c, b: NoiseMask(r, 'stop'),
             block=lambda r, c, b: BlockMask(r, r*b, min_area=.02 + .2*b*b, max_area=.02 + .4*b, roll=.04*(c % 2)))


def test_the_kinds_of_masks_here_are_all_there_are():
    assert {o.removesuffix('_noise') for o in mask_kinds} == set(KINDS)


def check_masks(h, w, ratio, bs, seed, kind, cell, share):
    "How much of it could be checked: 0 a configuration that is refused, 1 counts, 2 also that chance differs"
    L = h*w
    try: masker = KINDS[kind](ratio, cell, share); n = masker.n_hidden((h, w)); masker(1, (h, w), torch.Generator().manual_seed(0))
    except ValueError as e:
        assert ('patches' in str(e) or 'block areas' in str(e)) and '\n' not in str(e)
        return 0
    before, make = torch.get_rng_state(), lambda s: masker(bs, (h, w), torch.Generator().manual_seed(s))
    mask = make(seed)
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(mask, make(seed))
    assert mask.shape == (bs, L) and mask.dtype == torch.bool and 0 < n < L and (mask.sum(1) == n).all()
    order = mask.int().argsort(dim=1, stable=True)                  # visible ones first, as a model takes them
    assert not mask.gather(1, order[:, :L - n]).any() and mask.gather(1, order[:, L - n:]).all()
    assert all(sorted(o.tolist()) == list(range(L)) for o in order), 'disjoint and complete'
    assert torch.equal(FixedMask(mask[0].reshape(h, w))(2, (h, w)), mask[:1].repeat(2, 1))
    if kind == 'grid':
        seen, cells = ~mask.reshape(bs, h, w), math.ceil(h/cell)*math.ceil(w/cell)
        assert all(int(o.sum()) == cells == int(o.any(0).sum()*o.any(1).sum()) for o in seen), 'rows and columns of a grid'
        return 1
    width = dict(low=3*(.4 + 2*share), band=3, block=4).get(kind, 1)  # patches that are hidden or seen together
    if min(h, w) < 4 or math.comb(L, n) < 1e9 or L/width**2 < 8: return 1
    assert not torch.equal(mask, make(seed + 1)), 'another seed'
    assert len({tuple(o.tolist()) for o in mask}) == bs, 'each row is drawn by itself'
    return 2


def test_masks_of_any_configuration():
    "Exact counts, the same for the same seed, others for another, rows of their own, and the global generator stays as it was"
    outcomes = []

    @settings(fixed, max_examples=500)
    @given(h=st.integers(1, 20), w=st.integers(1, 20), ratio=st.floats(.02, .98), bs=st.integers(1, 6), seed=st.integers(0, 2**40), kind=st.sampled_from(list(KINDS)),
           cell=st.integers(2, 5), share=st.floats(0, 1))
    def check(**kw): outcomes.append(check_masks(**kw))

    check()
    assert len(outcomes) >= 500 and outcomes.count(0) < 200 and outcomes.count(2) > 100, [outcomes.count(o) for o in (0, 1, 2)]


# ---- checkpoints


small = dict(arch='vit_tiny_patch16_224', img_size=16, patch_size=8, width=32, depth=1, heads=2, pixel_width=16, pixel_depth=1, pixel_heads=2)


class Run:
    "Runs a function when it is unpickled"
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args


def hostile(canary):
    "Objects that leave the canary behind if they are unpickled with any code"
    code = f"open({str(canary)!r}, 'w').close()"
    return [Run(Path.touch, canary), Run(os.system, f'touch {canary}'), Run(exec, code), Run(eval, code), Run(open, str(canary), 'w'), Run(os.mkdir, str(canary)),
            Run(getattr, Run(Path.touch, canary), '__call__'), Run(map, exec, [code]), Run(pickle.loads, pickle.dumps(Run(Path.touch, canary))),
            Run(torch.load, str(canary)), Run(torch._utils._rebuild_tensor_v2, Run(Path.touch, canary), 0, (1,), (1,), False, {})]


def leaves(o):
    "All tensors and numbers in nested dicts and lists, copied"
    if isinstance(o, dict): o = list(o.values())
    if isinstance(o, list | tuple): return [x for p in o for x in leaves(p)]
    return [torch.as_tensor(o).clone()] if isinstance(o, torch.Tensor | float | int) else []


class Files:
    "Whole files of every kind with what may load them, and the model and the learner that they are loaded into"
    def __init__(self, folder):
        self.folder, self.canary = folder, folder/'canary'
        model = mim_model('mae', **small, seed=1)
        self.target = mim_model('mae', **small, seed=2)
        dls = mim_dls([np.full((20, 20, 3), o, np.uint8) for o in (9, 90, 200)], img_size=16, bs=2, crops_per_image=1, num_workers=0, device='cpu')
        self.learn = mim_learner(dls, mim_model('mae', **small, seed=3))
        self.learn.path = folder; quietly(self.learn, 'fit', 1, 1e-3); self.learn.save('saved')
        save_model(model, folder/'ours'); torch.save(dict(model=to_authors(model), epoch=3, args=dict(lr=1.)), folder/'theirs.pth')
        into = lambda p: load_weights(self.target, p)
        self.kinds = dict(ours=(folder/'ours.safetensors', [load_model, into], state(model)),
                          theirs=(folder/'theirs.pth', [lambda p: from_authors(p, 'mae', num_heads=2), into], state(model)),
                          saved=(folder/'models'/'saved.pth', [lambda p: self.learn.load(p.with_suffix('')), into], state(self.learn.model)))
        self.whole = {k: o[0].read_bytes() for k, o in self.kinds.items()}
        self.others = [*self.whole.values(), *(o.read_bytes() for o in [folder/'ours.json'])]
        self.outcomes = []

    def now(self): return state(self.target), state(self.learn.model), leaves(self.learn.opt.state_dict()), self.learn.opt

    def check(self, kind, data):
        "A plain error and everything as it was, or exactly what the whole file holds"
        file, loads, want = self.kinds[kind]
        path = self.folder/'models'/f'damaged{file.suffix}'; path.write_bytes(data)
        for i, load in enumerate(loads):
            before = self.now()
            try: res = load(path)
            except CheckpointError as e:
                said = str(e)
                assert path.name in said and '\n' not in said and len(said) < len(str(path)) + 400, said
                after = self.now()
                assert equal(before[0], after[0]) and equal(before[1], after[1]) and before[3] is after[3]
                assert len(before[2]) == len(after[2]) > 50 and all(map(torch.equal, before[2], after[2]))
                self.outcomes.append(False)
            else:
                got = state(self.target) if i else state(getattr(res, 'model', res))
                assert equal({k: v for k, v in got.items() if k in want}, want), 'loaded something else'
                with torch.no_grad():
                    for m in self.target, self.learn.model:
                        for p in m.parameters(): p.add_(.5)          # what was loaded is not there any more
                self.outcomes.append(True)
            assert not self.canary.exists(), 'code was run'
        path.unlink()


@pytest.fixture(scope='module')
def files(tmp_path_factory): return Files(tmp_path_factory.mktemp('checkpoints'))


def test_whole_files_load(files):
    for kind, data in files.whole.items(): files.check(kind, data)
    assert all(files.outcomes)


def test_checkpoints_with_any_damage_load_unchanged_or_not_at_all(files):
    files.outcomes.clear()

    @settings(fixed, max_examples=500)
    @given(kind=st.sampled_from(list(files.kinds)), what=edits('flip', 'set', 'insert', 'drop', 'cut', 'size', 'splice', 'repeat', most=3))
    def check(kind, what): files.check(kind, edit(files.whole[kind], what, files.others))

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        check()
    assert len(files.outcomes) >= 1000 and np.mean(files.outcomes) < .3


def repacked(data, name, f):
    "A zip archive with one of its parts changed, and checksums that fit"
    out = BytesIO()
    with zipfile.ZipFile(BytesIO(data)) as a, zipfile.ZipFile(out, 'w') as b:
        for o in a.infolist(): b.writestr(o.filename, f(a.read(o)) if o.filename.endswith(name) else a.read(o))
    return out.getvalue()


def test_hostile_pickles_are_refused_wherever_they_hide(files):
    "Beside the weights, among them, as a key, as the whole file, in the archive and in the old format; also damaged, in case half of the code is enough"
    content = read_file(files.folder/'theirs.pth'); saved = torch.load(files.folder/'models'/'saved.pth', weights_only=False)
    tried = 0
    for bad in hostile(files.canary):
        for kind, holds in (('theirs', content), ('saved', saved)):
            for obj in (holds | dict(args=bad), dict(holds, model=dict(holds['model'], cls_token=bad)), dict(holds, model=bad), bad, [bad],
                        holds | dict(opt=dict(state=[bad], hypers=[]))):
                for old in True, False:
                    f = BytesIO()
                    try: torch.save(obj, f, _use_new_zipfile_serialization=not old)
                    except Exception: continue  # not every hostile object can be saved in every place
                    if files.canary.exists(): files.canary.unlink() if files.canary.is_file() else files.canary.rmdir()
                    n = len(files.outcomes); files.check(kind, f.getvalue()); tried += 1
                    assert not any(files.outcomes[n:]), (bad.f, kind)
    assert tried > 150

    @settings(fixed, max_examples=60)
    @given(bad=st.sampled_from(hostile(files.canary)), kind=st.sampled_from(['theirs', 'saved']), place=st.floats(0, 1),
           what=edits('flip', 'insert', 'drop', 'set', most=2))
    def check(bad, kind, place, what):
        def inserted(pkl):
            at = int(place*len(pkl)); code = pickle.dumps(bad, protocol=2)[2:-1]
            return edit(pkl[:at] + code + pkl[at:], what, [pkl])
        files.check(kind, repacked(files.whole[kind], 'data.pkl', inserted))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        check()
