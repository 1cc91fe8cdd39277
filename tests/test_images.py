"""One opener for every kind of image: a corpus of modes, orientations and broken files, and folders of all shapes."""
import io
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from bootmae_nb.images import MAX_PIXELS, ImageError, image_files, image_size, open_image, sample_photo, sample_photos
from corpus import HALF_RED, NOISE, RED, STORED, bad_files, encode, palette, png_header, solid

# name, source, colour expected at the top left of an RGB picture
COLOURS = [
    ('1 white', encode(Image.new('1', (8, 6), 1)), (255,) * 3),
    ('1 black', encode(Image.new('1', (8, 6), 0)), (0,) * 3),
    ('L', encode(solid('L', 77)), (77,) * 3),
    ('L with tRNS', encode(solid('L', 77), transparency=77), (255,) * 3),
    ('LA', encode(solid('LA', (77, 0))), (255,) * 3),
    ('La', solid('LA', (200, 128)).convert('La'), (227,) * 3),
    ('P', palette(), (0, 255, 0)),
    ('P transparent', palette(True), (255,) * 3),
    ('PA', solid('RGBA', (*RED, 0)).convert('PA'), (255,) * 3),
    ('RGB', encode(solid('RGB', RED)), RED),
    ('RGB with tRNS', encode(solid('RGB', RED), transparency=RED), (255,) * 3),
    ('RGBA opaque', encode(solid('RGBA', (*RED, 255))), RED),
    ('RGBA half', encode(solid('RGBA', (*RED, 128))), HALF_RED),
    ('RGBa', solid('RGBA', (*RED, 128)).convert('RGBa'), HALF_RED),
    ('RGBX', solid('RGB', RED).convert('RGBX'), RED),
    ('CMYK', encode(solid('CMYK', (0, 255, 255, 0)), 'tiff'), RED),
    ('CMYK JPEG', encode(solid('CMYK', (0, 255, 255, 0)), 'jpeg', quality=100), RED),
    ('YCbCr', solid('RGB', RED).convert('YCbCr'), RED),
    ('HSV', solid('HSV', (0, 255, 255)), RED),
    ('LAB grey', encode(solid('LAB', (255, 128, 128)), 'tiff'), (255,) * 3),
    ('I;16', encode(Image.fromarray(np.full((6, 8), 0x8080, np.uint16))), (128,) * 3),
    ('I;16B', encode(Image.frombytes('I;16B', (8, 6), b'\x40\x40' * 48), 'tiff'), (64,) * 3),
    ('I;16L', Image.frombytes('I;16L', (8, 6), b'\x01\xff' * 48), (254,) * 3),
    ('I', Image.fromarray(np.full((6, 8), 65535, np.int32)), (255,) * 3),
    ('16-bit PGM', b'P5 8 6 65535\n' + b'\x80\x80' * 48, (128,) * 3),
    ('F 0..1', encode(Image.fromarray(np.full((6, 8), .2, np.float32)), 'tiff'), (51,) * 3),
    ('F 0..255', Image.fromarray(np.full((6, 8), 200, np.float32)), (200,) * 3),
    ('F all NaN', Image.fromarray(np.full((6, 8), np.nan, np.float32)), (0,) * 3),
    ('GIF', encode(solid('P', 0), 'gif', save_all=True, append_images=[solid('P', 3)]), (0,) * 3),
    ('WebP', encode(solid('RGB', RED), 'webp', lossless=True), RED),
    ('BMP', encode(solid('RGB', RED), 'bmp'), RED),
    ('JPEG 2000', encode(solid('RGB', RED), 'jpeg2000'), RED),
]


@pytest.mark.parametrize('src,want', [o[1:] for o in COLOURS], ids=[o[0] for o in COLOURS])
def test_every_mode_gives_the_right_colour(src, want):
    im = open_image(src)
    assert im.mode == 'RGB' and tuple(im.size) == (8, 6)
    assert np.abs(np.subtract(im.getpixel((0, 0)), want)).max() <= 1
    grey, rgba = open_image(src, channels=1), open_image(src, channels=4)
    assert (grey.mode, rgba.mode) == ('L', 'RGBA')
    assert abs(grey.getpixel((0, 0)) - np.dot(want, (.299, .587, .114))) <= 1.5


def test_channels_four_keep_opacity():
    assert open_image(encode(solid('RGBA', (*RED, 128))), 4).getpixel((0, 0)) == (*RED, 128)
    assert open_image(encode(solid('RGB', RED)), 4).getpixel((0, 0)) == (*RED, 255)
    im = open_image(palette(True), 4)
    assert im.getpixel((0, 0))[3] == 0 and im.getpixel((7, 0)) == (*RED, 255)


def test_sixteen_bits_keep_their_scale_whatever_the_content():
    dark = np.full((4, 4), 0x0a0a, np.uint16); dark[0, 0] = 0x1414
    im = np.asarray(open_image(encode(Image.fromarray(dark)), 1))
    assert (im[0, 0], im[1, 1]) == (20, 10)
    for src in (x := np.full((2, 2), 65400, np.uint16)), Image.fromarray(x): assert open_image(src, 1).getpixel((0, 0)) == 254  # 65400 / 257 = 254.47


def test_values_outside_any_natural_range_are_stretched():
    elevation = np.array([[-100, 900], [400, np.nan]], np.float32)
    assert np.array_equal(open_image(Image.fromarray(elevation), 1), [[0, 255], [128, 0]])
    deep = np.array([[0, 2**20], [2**19, 0]], np.int32)
    assert np.array_equal(open_image(Image.fromarray(deep), 1), [[0, 255], [128, 0]])


@pytest.mark.parametrize('x,want', [
    (np.full((4, 5), 9, np.uint8), 9), (np.ones((4, 5, 1), bool), 255), (np.full((4, 5, 3), 9), 9),
    (np.full((4, 5, 3), .5), 128), (np.full((4, 5), 0x0909, np.uint16), 9), (np.full((4, 5, 3), 0x0909, '>u2'), 9),
    (np.full((4, 5, 2), 0, np.uint8), 255), (np.full((4, 5, 4), 0, np.uint8), 255), (np.full((4, 5, 3), 9, np.float16), 9)])
def test_arrays(x, want):
    assert open_image(x).getpixel((4, 3)) == (want,) * 3
    assert image_size(x) == (5, 4)


@pytest.mark.parametrize('x', [np.zeros((3, 40, 40)), np.zeros((4, 4, 5)), np.zeros(4), np.zeros((0, 4)), np.array('x'), np.zeros((2, 2), complex)])
def test_arrays_of_other_shapes_are_refused(x):
    with pytest.raises(ImageError, match='the image (is an array|has no pixels)'): open_image(x)


ARROW = np.zeros((4, 6, 3), np.uint8); ARROW[0], ARROW[:, 0] = (0, 0, 255), (255, 0, 0)


@pytest.mark.parametrize('fmt,kw', [('png', {}), ('tiff', {}), ('webp', dict(lossless=True)), ('avif', dict(quality=100, subsampling='4:4:4'))])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_all_orientations_come_out_upright(orientation, fmt, kw):
    big = ARROW.repeat(8, 0).repeat(8, 1)
    exif = Image.Exif(); exif[0x0112] = orientation
    im = open_image(encode(Image.fromarray(np.ascontiguousarray(STORED[orientation](big))), fmt, exif=exif, **kw))
    assert np.abs(np.asarray(im).astype(int) - big).max() <= (12 if fmt == 'avif' else 0)
    assert np.array_equal(open_image(im), im), 'opening twice must not turn twice'


def test_damaged_exif_loses_no_photograph():
    data = bytearray(encode(solid('RGB', RED), 'jpeg', exif=b'Exif\0\0MM\0*\0\0\0\x08\xff\xff' + b'\xff' * 40))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert open_image(bytes(data)).size == (8, 6)
    assert open_image(solid('RGB', RED, exif=b'Exif\0\0garbage')).getpixel((0, 0)) == RED


BROKEN = {file: (data, says) for _, _, file, data, says in bad_files()} | {
    'large.png': (png_header(9_000, 9_000), '9,000 x 9,000 pixels'),
    'strip.png': (png_header(30_000, 2), 'strip of 30,000 x 2')}


@pytest.mark.parametrize('name', BROKEN)
def test_broken_files_are_named(tmp_path, name):
    data, problem = BROKEN[name]
    path = tmp_path/name; path.write_bytes(data)
    with pytest.raises(ImageError, match=problem) as e: open_image(path)
    assert str(e.value).startswith(str(path)) and '\n' not in str(e.value)
    with pytest.raises(ImageError, match=problem): open_image(data)
    with pytest.raises(ImageError, match='^the upload .*'): open_image(io.BytesIO(data), name='the upload')


def test_every_prefix_of_a_file_is_refused_or_opened_but_never_crashes(tmp_path):
    for fmt in 'png', 'jpeg', 'gif', 'webp', 'tiff', 'bmp', 'jpeg2000':
        data = encode(NOISE, fmt)
        for n in range(1, len(data), max(1, len(data) // 60)):
            with pytest.raises(ImageError): open_image(data[:n], name='part')


def test_refusal_comes_before_decoding():
    code = ('import resource\nfrom bootmae_nb.images import *\nimport sys\ndata = sys.stdin.buffer.read()\n'
            'before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
            'try: open_image(data)\nexcept ImageError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)')
    data = encode(Image.new('L', (13_000, 13_000)))
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], input=data, capture_output=True, check=True).stdout
    assert int(out) < 20_000, f'{int(out):,} kB were taken to refuse a bomb of 169 MB'


def test_limits_are_arguments_and_nothing_global_changes():
    limit = Image.MAX_IMAGE_PIXELS
    small, large = encode(Image.new('L', (40, 40))), np.zeros((101, 100))
    assert open_image(small, max_pixels=1600).size == (40, 40)
    for src in small, large:
        with pytest.raises(ImageError, match='make it smaller, or raise max_pixels'): open_image(src, max_pixels=1599)
    with pytest.raises(ImageError): image_size(Image.new('L', (40, 41)), max_pixels=1600)
    assert Image.MAX_IMAGE_PIXELS == limit and MAX_PIXELS < limit


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(ImageError, match='is a folder'): open_image(tmp_path)
    with pytest.raises(ImageError, match='does not exist'): open_image(tmp_path/'missing.png')
    with pytest.raises(ImageError, match='cannot be read'): open_image('a\0b.png')
    with pytest.raises(ImageError, match='of type int'): open_image(3)
    with pytest.raises(ImageError, match='opened as text'): open_image(io.StringIO('x'))
    os.mkfifo(tmp_path/'pipe.png')
    with pytest.raises(ImageError, match='not a regular file'): open_image(tmp_path/'pipe.png')


def test_the_result_is_independent_of_the_source():
    src = solid('RGB', RED, exif=b'', note='keep')
    im = open_image(src); im.putpixel((0, 0), (0, 0, 0))
    assert src.getpixel((0, 0)) == RED and src.info['note'] == 'keep' and im.info == {}


def test_a_file_is_read_from_its_start_and_closed(tmp_path):
    path = tmp_path/'a.png'; path.write_bytes(encode(solid('RGB', RED)))
    with path.open('rb') as f: f.read(10); assert open_image(f).getpixel((0, 0)) == RED
    with warnings.catch_warnings():
        warnings.simplefilter('error', ResourceWarning)
        open_image(path); image_size(path)


def test_reduced_decoding_shows_the_same_picture(tmp_path):
    photo = sample_photo('retina'); photo.save(tmp_path/'r.jpg', quality=95)
    full, half = open_image(tmp_path/'r.jpg'), open_image(tmp_path/'r.jpg', min_side=600)
    assert half.size == (706, 706) and image_size(tmp_path/'r.jpg', min_side=600) == half.size
    a, b = (np.asarray(o.resize((300, 300), Image.Resampling.BICUBIC)).astype(float) for o in (full, half))
    assert np.abs(a - b).mean() < 1.5


def test_threads_agree_with_one_thread():
    work = [o[1] for o in COLOURS if isinstance(o[1], bytes)] * 10
    want = [open_image(o).tobytes() for o in work]
    with ThreadPoolExecutor(8) as pool: assert [o.tobytes() for o in pool.map(open_image, work)] == want


@pytest.mark.parametrize('fmt', ['tiff', 'gif', 'webp', 'png', 'avif'])
def test_the_first_of_several_pictures_is_taken(fmt):
    film = encode(solid('RGB', RED), fmt, save_all=True, append_images=[solid('RGB', (0, 0, 255))])
    assert Image.open(io.BytesIO(film)).n_frames == 2
    assert np.abs(np.subtract(open_image(film).getpixel((4, 4)), RED)).max() < 9


def touch(folder, *names):
    for o in names: (folder/o).parent.mkdir(parents=True, exist_ok=True); (folder/o).touch()


def test_image_files(tmp_path):
    touch(tmp_path, 'z.jpg', 'B/a.JPEG', 'B/c/d.TiF', 'B/c.txt', '.hidden/x.jpg', '__MACOSX/x.jpg', 'B/._a.JPEG', '.y.png', 'Thumbs.db')
    found = image_files(tmp_path)
    assert [o.relative_to(tmp_path).as_posix() for o in found] == ['B/a.JPEG', 'B/c/d.TiF', 'z.jpg']
    assert image_files(str(tmp_path)) == found
    assert image_files(tmp_path, recurse=False) == [tmp_path/'z.jpg']
    assert image_files(tmp_path/'B'/'c.txt') == [tmp_path/'B'/'c.txt']


def test_links_are_followed_once(tmp_path):
    a, b = tmp_path/'a', tmp_path/'b'
    touch(tmp_path, 'a/1.png', 'b/2.png')
    (a/'up').symlink_to(tmp_path); (a/'self').symlink_to(a); (a/'other').symlink_to(b); (a/'other2').symlink_to(b)
    assert sorted(o.name for o in image_files(a)) == ['1.png', '2.png']


def test_a_hidden_root_is_allowed(tmp_path):
    touch(tmp_path, '.cache/a.png')
    assert len(image_files(tmp_path/'.cache')) == 1


def test_folders_without_images(tmp_path):
    with pytest.raises(ImageError, match=r'holds no images.*\.jpg'): image_files(tmp_path)
    with pytest.raises(ImageError, match='does not exist'): image_files(tmp_path/'missing')


def test_sample_photos_are_photographs_with_credits():
    photos = sample_photos(grey=True)
    assert len(sample_photos()) == 11 and len(photos) == 18
    assert all(o.credit and min(image_size(o.path)) >= 300 for o in photos)
    for o in photos:
        flat = np.asarray(open_image(o.path)).reshape(-1, 3)
        assert ((flat == flat[:, :1]).all() and o.channels == 1) or o.channels == 3, o.name
        assert len(np.unique(flat[:, 0])) > 60, f'{o.name} looks like a drawing'


def test_a_missing_package_means_fewer_photographs(monkeypatch):
    import importlib.util
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'skimage' else find(name))
    assert [o.name for o in sample_photos()] == ['china', 'flower', 'grace_hopper']
    with pytest.raises(ImageError, match='choose one of china'): sample_photo('astronaut')


def test_importing_is_light():
    code = "import sys, bootmae_nb.images; print([m for m in ('torch', 'fastai', 'skimage', 'sklearn', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
