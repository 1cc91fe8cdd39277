"""Files as folders hold them, good, odd and broken: the one list of all cases, each with what must happen. The table in nbs/02_images.ipynb says the same."""
import io
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

VERDICTS = ('accepted',                # opened as it is
            'accepted with a rule',    # opened, with a decision that somebody may want to know
            'refused',                 # its name or header shows it: left out before training
            'skipped in training')     # only decoding shows it: another image takes its place
RED, HALF_RED, GREEN = (255, 0, 0), (255, 127, 127), (0, 255, 0)


@dataclass(frozen=True)
class Case:
    "A file and what must happen to it"
    name: str  # as in the table of the notebook
    verdict: str  # one of `VERDICTS`
    path: Path
    says: str = ''  # refused, skipped: pattern of the error
    pixels: np.ndarray | None = None  # accepted: what RGB must come out, (H, W, 3)
    tol: int = 0  # by how much a value may differ
    listed: bool = True  # whether a search of the folder finds it
    needs_user: bool = False  # the file is good for root, who may read anything

    @property
    def good(self): return self.verdict.startswith('accepted')


def encode(im, fmt='png', **kw):
    f = io.BytesIO(); im.save(f, fmt, **kw)
    return f.getvalue()


def solid(mode, colour, **info):
    im = Image.new(mode, (8, 6), colour); im.info.update(info)
    return im


def palette(transparent=False):
    "A palette image whose entry 1 is red and whose entry 0, green, may be transparent; it shows entry 0 left, 1 right"
    im = Image.new('P', (8, 6), 1); im.putpalette([0, 255, 0, 255, 0, 0]); im.paste(0, (0, 0, 4, 6))
    return encode(im, **(dict(transparency=0) if transparent else {}))


def png_header(w, h):
    "A PNG of any size, without its pixels"
    chunk = lambda k, d: struct.pack('>I', len(d)) + k + d + struct.pack('>I', zlib.crc32(k + d))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0)) + chunk(b'IDAT', b'x')


def tiled_tiff(size, tile):
    "A small picture in a tile of any size; whole if the tile is small"
    body = zlib.compress(bytes(min(tile, 64)**2))
    tags = [(256, size), (257, size), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile), (323, tile), (324, 134), (325, len(body))]
    return b'II*\0' + struct.pack('<IH', 8, len(tags)) + b''.join(struct.pack('<HHII', t, 4, 1, v) for t, v in tags) + bytes(4) + body


def flip(data, at, bit=3):
    res = bytearray(data); res[int(len(data) * at)] ^= 1 << bit
    return bytes(res)


ARROW = np.zeros((32, 48, 3), np.uint8); ARROW[:8], ARROW[:, :8] = (0, 0, 255), RED
STORED = {1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1], 5: lambda x: x.swapaxes(0, 1),
          6: lambda x: np.rot90(x), 7: lambda x: x[::-1, ::-1].swapaxes(0, 1), 8: lambda x: np.rot90(x, -1)}


def turned(orientation, fmt='png', **kw):
    "The arrow as a camera stores it that was held in one of eight ways"
    exif = Image.Exif(); exif[0x0112] = orientation
    return encode(Image.fromarray(np.ascontiguousarray(STORED[orientation](ARROW))), fmt, exif=exif, **kw)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
SMOOTH = NOISE.resize((8, 8)).resize((64, 64), Image.Resampling.BICUBIC)


def decoded(data): return np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))
def like(colour, h=6, w=8): return np.broadcast_to(np.array(colour, np.uint8), (h, w, 3))
def deep(value, dtype): return Image.fromarray(np.full((6, 8), value, dtype))


def holes():
    x = np.full((6, 8), .2, np.float32); x[0] = np.nan, *[.2] * 6, np.inf
    return x


def zipped():
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w') as z: z.writestr('photo.png', encode(SMOOTH))
    return f.getvalue()


def movie(fmt, **kw): return encode(solid('RGB', RED), fmt, save_all=True, append_images=[solid('RGB', (0, 0, 255))], **kw)


def good_files():
    "Name, verdict, file name, bytes, pixels, tolerance"
    jpeg, png = encode(SMOOTH, 'jpeg', quality=90), encode(SMOOTH)
    cmyk = solid('CMYK', (0, 255, 255, 0))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    ok, rule = VERDICTS[:2]
    two = np.concatenate([like(GREEN, w=4), like(RED, w=4)], 1)
    paper = np.concatenate([like((255,) * 3, w=4), like(RED, w=4)], 1)
    lost = like((51,) * 3).copy(); lost[0, 0] = lost[0, 7] = 0
    yield from [
        ('JPEG', ok, 'photo.jpg', jpeg, decoded(jpeg), 0),
        ('PNG', ok, 'photo.png', png, np.asarray(SMOOTH), 0),
        ('AVIF', ok, 'photo.avif', encode(SMOOTH, 'avif', quality=100, subsampling='4:4:4'), np.asarray(SMOOTH), 8),
        ('WebP', ok, 'photo.webp', encode(SMOOTH, 'webp', lossless=True), np.asarray(SMOOTH), 0),
        ('JPEG 2000', ok, 'photo.jp2', encode(SMOOTH, 'jpeg2000'), np.asarray(SMOOTH), 0),
        ('BMP', ok, 'photo.bmp', encode(SMOOTH, 'bmp'), np.asarray(SMOOTH), 0),
        ('wrong extension (PNG named .jpg)', ok, 'really_png.jpg', png, np.asarray(SMOOTH), 0),
        ('grey JPEG', ok, 'grey.jpg', encode(solid('L', 77), 'jpeg'), like((77,) * 3), 0),
        ('1 bit per pixel', ok, 'bits.png', encode(Image.new('1', (8, 6), 1)), like((255,) * 3), 0),
        ('palette', ok, 'palette.png', palette(), two, 0),
        ('progressive JPEG', ok, 'progressive.jpg', encode(SMOOTH, 'jpeg', progressive=True), decoded(encode(SMOOTH, 'jpeg', progressive=True)), 0),
        ('1 x 1 pixel', ok, 'dot.png', encode(Image.new('RGB', (1, 1), RED)), like(RED, 1, 1), 0),
        ('CMYK JPEG', rule, 'cmyk.jpg', encode(cmyk, 'jpeg', quality=100), like(RED), 1),
        ('CMYK JPEG with an ICC profile', rule, 'cmyk_icc.jpg', encode(cmyk, 'jpeg', quality=100, icc_profile=profile), like(RED), 1),
        ('RGB with an ICC profile', rule, 'icc.png', encode(solid('RGB', RED), icc_profile=profile), like(RED), 0),
        ('16-bit grey PNG', rule, 'grey16.png', encode(deep(0x8080, np.uint16)), like((128,) * 3), 0),
        ('16-bit TIFF', rule, 'grey16.tif', encode(deep(0x4040, np.uint16), 'tiff'), like((64,) * 3), 0),
        ('float TIFF, 0..1', rule, 'float.tif', encode(deep(.2, np.float32), 'tiff'), like((51,) * 3), 0),
        ('float TIFF with NaN and infinity', rule, 'holes.tif', encode(Image.fromarray(holes()), 'tiff'), lost, 0),
        ('float TIFF of any range (elevations)', rule, 'heights.tif', encode(Image.fromarray(np.array([[-100, 900]] * 2, np.float32)), 'tiff'),
         np.stack([like((0,) * 3, 2, 1), like((255,) * 3, 2, 1)], 1)[:, :, 0], 0),
        ('palette with transparency', rule, 'palette_alpha.png', palette(True), paper, 0),
        ('RGBA', rule, 'rgba.png', encode(solid('RGBA', (*RED, 128))), like(HALF_RED), 1),
        ('grey with alpha', rule, 'la.png', encode(solid('LA', (77, 0))), like((255,) * 3), 0),
        ('PNG with one transparent colour', rule, 'trns.png', encode(solid('RGB', RED), transparency=RED), like((255,) * 3), 0),
        *(('EXIF orientation 2 to 8' if o > 1 else 'EXIF orientation 1', rule if o > 1 else ok, f'turned{o}.png', turned(o), ARROW, 0) for o in range(1, 9)),
        ('corrupt EXIF block', rule, 'exif.jpg', encode(solid('RGB', RED), 'jpeg', quality=100, exif=b'Exif\0\0MM\0*\0\0\0\x08\xff\xff' + b'\xff' * 40), like(RED), 2),
        ('animated GIF', rule, 'film.gif', movie('gif'), like(RED), 0),
        ('animated WebP', rule, 'film.webp', movie('webp', lossless=True), like(RED), 0),
        ('TIFF of several pages', rule, 'pages.tif', movie('tiff'), like(RED), 0),
        ('JPEG with garbage behind its end', rule, 'tail.jpg', jpeg + b'<script>' * 300, decoded(jpeg), 0),
        ('JPEG with a flipped bit', rule, 'flipped.jpg', flip(jpeg, .7), decoded(flip(jpeg, .7)), 0),
    ]


def bad_files():
    "Name, verdict, file name, bytes, pattern of the error"
    jpeg, png = encode(NOISE, 'jpeg'), encode(NOISE)
    no, late = VERDICTS[2:]
    broken = 'truncated or damaged'
    yield from [
        ('empty file', no, 'empty.jpg', b'', r'is empty \(0 bytes\)'),
        ('text named .jpg', no, 'notes.jpg', b'nothing to see\n', 'holds text'),
        ('web page named .jpg', no, 'page.jpg', b'\n<!DOCTYPE html><html><title>404</title></html>', 'web page or a drawing'),
        ('SVG drawing', no, 'drawing.png', b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'web page or a drawing'),
        ('JSON named .png', no, 'answer.png', b'{"error": "not found"}', 'holds text'),
        ('EPS (a program that draws)', no, 'eps.jpg', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'holds text'),
        ('random bytes', no, 'noise.jpg', np.random.default_rng(1).bytes(1000), 'damaged or in an unknown format'),
        ('nothing but zeros', no, 'zeros.jpg', bytes(1000), 'damaged or in an unknown format'),
        ('ZIP named .png', no, 'archive.png', zipped(), 'damaged or in an unknown format'),
        ('icon (may hide a second image)', no, 'icon.png', encode(solid('RGB', RED), 'ico'), 'unknown format'),
        ('JPEG cut in its header', no, 'header.jpg', jpeg[:100], broken),
        ('PNG cut in its header', no, 'header.png', png[:20], broken),
        ('PNG of 20,000 x 20,000 (a bomb)', no, 'bomb.png', png_header(20_000, 20_000), 'MAX_IMAGE_PIXELS|pixels, more than'),
        ('PNG of 12,000 x 12,000', no, 'large.png', encode(Image.new('1', (12_000, 12_000))), '12,000 x 12,000 pixels, more than'),
        ('TIFF with a tile of 30,000 x 30,000', no, 'tiles.tif', tiled_tiff(10, 30_000), 'tiles of more than'),
        ('strip of 1 x 5,000', no, 'strip.png', encode(Image.new('L', (1, 5000))), 'strip of 1 x 5,000'),
        ('side of 100,000', no, 'long.png', png_header(100_000, 2), 'a side of 100,000'),
        ('WebP cut in half', no, 'cut.webp', encode(NOISE, 'webp')[:2000], broken),
        ('AVIF cut in half', no, 'cut.avif', encode(NOISE, 'avif')[:2000], 'damaged or in an unknown format'),
        ('JPEG cut in half', late, 'cut.jpg', jpeg[:len(jpeg) // 2], broken),
        ('PNG cut in half', late, 'cut.png', png[:len(png) // 2], broken),
        ('TIFF cut in half', late, 'cut.tif', encode(NOISE, 'tiff')[:6000], broken),
        ('BMP cut in half', late, 'cut.bmp', encode(NOISE, 'bmp')[:6000], broken),
        ('GIF cut in half', late, 'cut.gif', encode(NOISE, 'gif')[:2000], broken),
        ('PNG with a flipped bit', late, 'flipped.png', flip(png, .5), broken),
    ]


def special_files(folder):
    "What is wrong with these is not their content: they are made by the file system"
    no = VERDICTS[2]
    (folder/'folder.jpg').mkdir()
    yield Case('folder named .jpg', no, folder/'folder.jpg', 'is a folder', listed=False)
    (folder/'lost.jpg').symlink_to('nowhere.jpg')
    yield Case('link to a file that is gone', no, folder/'lost.jpg', 'a link to a file that does not exist')
    (folder/'loop.jpg').symlink_to('loop.jpg')
    yield Case('link to itself', no, folder/'loop.jpg', 'cannot be read')
    os.mkfifo(folder/'pipe.jpg')
    yield Case('pipe named .jpg', no, folder/'pipe.jpg', 'not a regular file')
    (folder/'locked.png').write_bytes(encode(SMOOTH)); (folder/'locked.png').chmod(0)
    yield Case('file without permission', no, folder/'locked.png', r'cannot be read \(Permission denied\)', needs_user=True)


def odd_names(folder):
    "Good photographs whose names are hard to print"
    for name, file in (('file name that is not UTF-8', b'caf\xe9.png'), ('file name with a line break', b'two\nlines.png'),
                       ('file name of 255 characters', b'x' * 251 + b'.png')):
        path = Path(os.fsdecode(os.fsencode(folder) + b'/' + file)); path.write_bytes(encode(SMOOTH))
        yield Case(name, 'accepted', path, pixels=np.asarray(SMOOTH))
    path = Path(os.fsdecode(os.fsencode(folder) + b'/bad\n\xe9.png')); path.write_bytes(b'')
    yield Case('empty file whose name cannot be printed', 'refused', path, 'is empty')


def make_corpus(
    folder,  # written to; must exist
) -> list:  # of `Case`, in the order of the table
    "All files, and what must happen to each"
    folder = Path(folder)
    cases = []
    for name, verdict, file, data, pixels, tol in good_files():
        (folder/file).write_bytes(data)
        cases.append(Case(name, verdict, folder/file, pixels=pixels, tol=tol))
    cases += odd_names(folder)
    for name, verdict, file, data, says in bad_files():
        (folder/file).write_bytes(data)
        cases.append(Case(name, verdict, folder/file, says))
    return [*cases, *special_files(folder)]
