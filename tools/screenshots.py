"""Pictures of the demo for the README: `python tools/screenshots.py [--checkpoint FILE_OR_FOLDER]` writes nbs/images/app_*.png."""
import argparse
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root/'tests')]
from browser import chromium, find_chromium, running_demo # noqa: E402

LIMIT = 400_000
SHOTS = dict( # name: width, height, address, tab, photograph
    app_desktop=(1280, 1130, '?photo=coffee&mask=block&ratio=0.60&seed=3', 'Pixels'),
    app_phone=(390, 844, '?photo=chelsea&mask=block&ratio=0.50&seed=1', None),
    app_dark=(1280, 1130, '?__theme=dark&photo=chelsea&mask=random&ratio=0.60&seed=2', 'Ask a patch'))


def shoot(browser, url, name):
    "One picture, in few colours where it would be too large for the repository."
    width, height, address, tab = SHOTS[name]
    phone = width < 600
    page = browser.new_page(viewport=dict(width=width, height=height), is_mobile=phone, has_touch=phone, device_scale_factor=1.5 if phone else 1)
    page.goto(f'{url}/{address}')
    page.wait_for_selector('#stage img', timeout=60_000)
    if tab: page.get_by_role('tab', name=tab).click()
    page.wait_for_timeout(1500) # pictures and fonts are drawn
    im = Image.open(io.BytesIO(page.screenshot())).convert('RGB')
    page.close()
    file = root/'nbs'/'images'/f'{name}.png'
    im.save(file, optimize=True)
    if file.stat().st_size > LIMIT: few_colours(im).save(file, optimize=True)
    print(f'{file.relative_to(root)}: {im.width} x {im.height}, {file.stat().st_size//1000} kB')
    if file.stat().st_size > LIMIT: sys.exit(f'{file.name} is larger than {LIMIT//1000} kB: make the window smaller')


def few_colours(im):
    "256 colours, chosen so that rare ones, such as those of the legends, are kept"
    return im.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.FLOYDSTEINBERG)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--checkpoint', type=Path, help='a model, or a folder that holds some; the newest run if not given')
    checkpoint, path = parser.parse_args().checkpoint, find_chromium()
    if path is None: sys.exit('No Chromium was found: install chromium, or name one in the variable CHROMIUM')
    with tempfile.TemporaryDirectory() as folder:
        with running_demo(*(['--checkpoint', checkpoint] if checkpoint else []), log=Path(folder)/'log') as (url, _), chromium(path) as browser:
            for name in SHOTS: shoot(browser, url, name)


if __name__ == '__main__': main()
