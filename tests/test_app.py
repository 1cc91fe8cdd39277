"""The demo as people and programs meet it: the named endpoints, what a stranger may send, and the whole page in a browser."""
import io
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from bootmae_nb import checkpoints
from bootmae_nb.checkpoints import CheckpointError, load_model, packaged_file, save_model
from bootmae_nb.demo import Guard, RequestError, Studio, check_body, find_models, hand_mask, shown_names
from bootmae_nb.images import sample_photo, sample_photos
from bootmae_nb.masking import make_mask
from bootmae_nb.models import mim_model
from bootmae_nb.segment import make_segmenter
from bootmae_nb.viz import View
from browser import chromium, find_chromium, root, running_demo
from test_images import BROKEN, encode

tiny = dict(arch='vit_tiny_patch16_224', img_size=64, patch_size=8, width=48, depth=2, heads=3, pixel_width=48, seed=0)
secrets = re.compile(r'Traceback|File \\?"|site-packages|\.py\b|(?<![\w:/.])/(?:tmp|home|root|usr|work|var|etc)/')


class Demo:
    "A running demo, and ways to talk to it"
    def __init__(self, url, process, log, models): self.url, self.process, self.log, self.models = url, process, Path(log), models

    def post(self, path, **kw): return httpx.post(self.url + path, timeout=60, **kw)

    def call(self, name, *data):
        "Status and text of an answer, as a bare HTTP client sees it: 'complete', 'error', or the status of a refusal"
        r = self.post(f'/gradio_api/call/{name}', json=dict(data=data))
        if r.status_code != 200: return r.status_code, r.text
        with httpx.stream('GET', f"{self.url}/gradio_api/call/{name}/{r.json()['event_id']}", timeout=60) as s: text = s.read().decode()
        return re.findall('event: (complete|error)', text)[-1], text

    def upload(self, name, data):
        r = self.post('/gradio_api/upload', files=dict(files=(name, data)))
        return r.json()[0] if r.status_code == 200 else r

    def ask(self, image=None, photo='chelsea', model='both', mask='block', ratio=.75, seed=0, hidden='', raw=False):
        return self.call('similarity', image, photo, model, mask, ratio, seed, hidden, raw)

    def is_well(self): return self.ask()[0] == 'complete'

    def memory(self, key='VmHWM'):
        "Memory in MB, at its peak so far"
        text = Path(f'/proc/{self.process.pid}/status').read_text()
        return int(re.search(rf'{key}:\s+(\d+)', text)[1])/1024


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    "The demo with three tiny models, one for each method"
    folder = tmp_path_factory.mktemp('demo')
    models = dict(both=mim_model('bootmae', **tiny), pixels=mim_model('mae', **tiny), features=mim_model('dbot', **tiny))
    for name in reversed(models): save_model(models[name], folder/'runs'/name/'model')
    (folder/'runs'/'other.safetensors').write_bytes(b'not a checkpoint')
    models = {k: load_model(folder/'runs'/k) for k in models}
    with running_demo('--checkpoint', folder/'runs', log=folder/'log', GRADIO_TEMP_DIR=str(folder/'cache')) as (url, process):
        yield Demo(url, process, folder/'log', models)


@pytest.fixture(scope='module')
def client(demo, tmp_path_factory): return Client(demo.url, verbose=False, download_files=str(tmp_path_factory.mktemp('client')))


@pytest.fixture(scope='module')
def cat(tmp_path_factory):
    path = tmp_path_factory.mktemp('pictures')/'cat.png'; sample_photo('chelsea').save(path)
    return path


# values

def near(a, b): return np.allclose(a, b.numpy() if hasattr(b, 'numpy') else b, atol=2e-3)


def test_only_three_endpoints_are_public(client):
    about = client.view_api(return_format='dict')['named_endpoints']
    assert set(about) == {'/reconstruct', '/similarity', '/query'}
    names = [o['parameter_name'] for o in about['/query']['parameters']]
    assert names == ['image', 'photo', 'model', 'mask', 'ratio', 'seed', 'hidden', 'patch', 'raw']
    assert all(o['parameter_has_default'] for o in about['/query']['parameters'])


def test_reconstruct_gives_what_the_view_shows(demo, client, cat):
    *files, numbers = client.predict(image=handle_file(cat), model='pixels', mask='random', ratio=.6, seed=5, api_name='/reconstruct')
    view = View(demo.models['pixels'], cat, make_mask('random', .6), 5)
    masked, pasted, prediction, error = (Image.open(o).convert('RGB') for o in files)
    assert np.array_equal(masked, view.masked())
    for got, want in (pasted, 'pasted in'), (prediction, 'prediction'):
        assert np.abs(np.asarray(got).astype(int) - np.asarray(view.parts()[want])).max() <= 1
    assert near(numbers['error'], view.error()) and error.height > 64
    assert numbers['hidden_patches'] == 39 and numbers['hidden'] == ''.join(str(int(o)) for o in view.mask[0])


@pytest.mark.parametrize('raw', [False, True])
def test_similarity_gives_the_values_of_the_view(demo, client, raw):
    picture, numbers = client.predict(photo='coffee', model='both', mask='low_noise', ratio=.5, seed=1, raw=raw, api_name='/similarity')
    view = View(demo.models['both'], sample_photo('coffee'), make_mask('low_noise', .5), 1)
    assert near(numbers['similarity'], view.similarity(not raw)) and Image.open(picture).height > 64
    assert not near(numbers['similarity'], view.similarity(raw))


def test_query_and_a_mask_by_hand(demo, client):
    hidden = ('1'*4 + '0'*4)*8
    teacher, predicted, numbers = client.predict(photo='china', model='features', mask='hand', hidden=hidden, patch=10, api_name='/query')
    view = View(demo.models['features'], sample_photo('china'), hand_mask(hidden, (8, 8)))
    for by in 'teacher', 'predicted': assert near(numbers[by], view.query(10, by))
    assert numbers['hidden'] == hidden and Image.open(teacher).size == Image.open(predicted).size


def test_models_without_a_decoder_say_so(client):
    with pytest.raises(AppError, match='predicts features.* needs a model with a pixel decoder'): client.predict(photo='china', model='features', api_name='/reconstruct')
    with pytest.raises(AppError, match='with a feature decoder'): client.predict(photo='china', model='pixels', api_name='/similarity')


def test_orientation_depth_and_opacity_are_right(demo, client, tmp_path):
    "The same picture in other clothes gives the same numbers"
    im = sample_photo('chelsea').resize((96, 96))
    exif = Image.Exif(); exif[0x0112] = 6
    im.transpose(Image.Transpose.ROTATE_90).save(tmp_path/'turned.png', exif=exif)
    im.putalpha(255); im.save(tmp_path/'opaque.png'); im.convert('RGB').save(tmp_path/'plain.png')
    grey = np.asarray(im.convert('L'))
    Image.fromarray(grey).save(tmp_path/'8.png'); Image.fromarray(grey.astype(np.uint16)*257).save(tmp_path/'16.png')
    values = lambda name: client.predict(image=handle_file(tmp_path/name), api_name='/reconstruct')[-1]['error']
    assert near(values('turned.png'), values('plain.png')) and near(values('opaque.png'), values('plain.png'))
    assert near(values('16.png'), values('8.png')) and not near(values('8.png'), values('plain.png'))


# safety

def bombs():
    "Small files that would fill the memory"
    return {
        'bomb.png': encode(Image.new('1', (13_000, 13_000))),
        'bomb.gif': encode(Image.new('P', (9_000, 9_000)), 'gif'),
        'bomb.tif': encode(Image.new('1', (20_000, 20_000)), 'tiff', compression='group4'),
        'bomb.jpg': encode(Image.new('L', (6_000, 6_000)), 'jpeg', progressive=True)}


def bad_files():
    "What is no picture, under all kinds of names"
    names = ['empty.jpg', 'page.jpg', 'noise.jpg', 'cut.png', 'bomb.png', 'tiles.tif', 'cut.jpg']
    suffixes = ['gif', 'svg', 'webp']
    renamed = {f'{Path(o).stem}_{i}.{s}': BROKEN[o][0] for o in names for i, s in enumerate(suffixes)}
    res = {k: v for k, (v, _) in BROKEN.items() if v} | {k: v for k, v in renamed.items() if v}
    return res | {'zip.png': b'PK\3\4' + bytes(100), 'script.svg': b'<svg onload="alert(1)"/>'}


def test_bad_files_and_bombs_are_refused_in_a_sentence_and_little_memory(demo):
    files = bad_files()
    assert len(files) >= 31 and demo.is_well()
    before = demo.memory()
    for name, data in (files | bombs()).items():
        path = demo.upload(name, data)
        assert isinstance(path, str), (name, path)
        status, text = demo.ask(dict(path=path, orig_name=name, meta={'_type': 'gradio.FileData'}))
        assert status == 'error' and 'he picture' in text and not secrets.search(text), (name, text)
    assert demo.is_well()
    assert demo.memory() - before < 400, f'{demo.memory() - before:.0f} MB more than before'
    assert 'Traceback' not in demo.log.read_text()


def test_pictures_up_to_the_limit_are_answered_in_little_memory(demo):
    before = demo.memory()
    deep, clear, photo = Image.fromarray(np.zeros((3400, 3600), np.uint16)), Image.new('RGBA', (3600, 3400)), Image.new('RGB', (5000, 4800))
    for name, im, fmt in ('deep.png', deep, 'png'), ('clear.png', clear, 'png'), ('photo.jpg', photo, 'jpeg'):
        status, text = demo.ask(dict(path=demo.upload(name, encode(im, fmt)), meta={'_type': 'gradio.FileData'}))
        assert status == 'complete', text
    assert demo.memory() - before < 400, f'{demo.memory() - before:.0f} MB more than before'


def test_large_uploads_and_requests_are_refused(demo):
    assert demo.upload('large.bin', bytes(11*2**20)).status_code == 413
    before = demo.memory()
    for body in [json.dumps(dict(data=['x'*70_000])).encode(), b'[' + b' '*(20*2**20) + b']']:
        for path in '/gradio_api/call/similarity', '/gradio_api/queue/join', '/gradio_api/run/predict', '/':
            r = demo.post(path, content=body, headers={'content-type': 'application/json'})
            assert r.status_code == 413 and 'larger than' in r.text
    assert demo.post('/gradio_api/queue/join', content=(b' '*2**16 for _ in range(400))).status_code == 413    # without a length
    assert demo.memory() - before < 100 and demo.is_well()


def test_addresses_paths_and_numbers_that_are_none(demo):
    data = 'data:image/png;base64,' + 'A'*1000
    for image in [dict(path=data), dict(path='x.png', url=data), dict(path='http://127.0.0.1:9/x.png'), dict(path='HTTPS://example.org/x.png'),
                  dict(url='file:///etc/passwd'), data, 'ftp://a/b']:
        status, text = demo.ask(image)
        assert status == 400 and 'address' in text, (image, text)
    for path in '/etc/passwd', '../../etc/passwd', str(demo.log), 'C:\\x', '', '\0':
        status, text = demo.ask(dict(path=path, meta={'_type': 'gradio.FileData'}))
        assert status in ('error', 400, 422) and 'root:' not in text and 'open http' not in text, (path, text)
    for text in 'NaN', 'Infinity', '-Infinity', '1e999', '{"a": NaN}':
        body = f'{{"data": [null, "chelsea", "both", "block", {text}, 0, "", false]}}'
        r = demo.post('/gradio_api/call/similarity', content=body, headers={'content-type': 'application/json'})
        assert r.status_code == 400 and 'detail' in r.json(), text
    assert demo.is_well()


@pytest.mark.parametrize('given,said', [
    (dict(ratio=.7512), 'between two steps'), (dict(ratio=2), '2'), (dict(ratio=-1), '-1'), (dict(ratio=0), '0'), (dict(ratio='much'), None),
    (dict(ratio=None), 'cannot be used'), (dict(seed=-1), '-1'), (dict(seed=2**40), '1099511627776'),
    (dict(mask='stripes'), 'stripes'), (dict(mask=['block']), None), (dict(model='../both'), 'both'), (dict(model='/etc/passwd'), None),
    (dict(photo='nobody'), 'no such photograph'), (dict(photo='<script>'), 'no such photograph'), (dict(mask='hand', hidden='01'), 'needs 64 digits'),
    (dict(mask='hand', hidden='0'*64), 'at least one'), (dict(mask='hand', hidden='x'*64), 'text of 0'), (dict(mask='hand', hidden=7), None)])
def test_values_that_are_not_offered_are_refused_in_a_sentence(demo, given, said):
    status, text = demo.ask(**given)
    assert status in ('error', 400, 422), text
    assert not secrets.search(text.replace('/etc/passwd', '')) and (said is None or said in text), text


def test_requests_that_make_no_sense(demo):
    posts = [('queue/join', dict(fn_index=9999, data=[], session_hash='a')), ('queue/join', dict(fn_index=0, data='x', session_hash='a')), ('queue/join', []),
             ('queue/join', dict(fn_index='a')), ('call/similarity', dict(data=[1])), ('call/nothing', dict(data=[])), ('call/query', dict(data={'a': 1})),
             ('component_server', dict(fn_name='x', component_id=0, session_hash='a', data=1)), ('reset', dict(a=1)), ('cancel', dict(a=1)),
             ('run/show', dict(data=[])), ('api/predict', dict(data=[]))]
    for path, body in posts:
        r = demo.post(f'/gradio_api/{path}', json=body)
        assert r.status_code != 500 and not secrets.search(r.text), (path, body, r.text)
    for path in ['/gradio_api/proxy=http://127.0.0.1:9/', '/gradio_api/file=/etc/passwd', '/gradio_api/file=../log', '/docs', '/monitoring',
                 '/gradio_api/stream/a/0/0/playlist.m3u8']:
        r = httpx.get(demo.url + path, timeout=20)
        assert r.status_code in (400, 403, 404, 405) and 'root:' not in r.text, (path, r.status_code, r.text[:200])
    assert demo.is_well()


def test_fifty_at_once(demo):
    before = demo.memory()
    with ThreadPoolExecutor(50) as pool: answers = list(pool.map(lambda i: demo.ask(photo='coffee', seed=i), range(50)))
    kinds = [o[0] for o in answers]
    assert kinds.count('complete') >= 1 and set(kinds) <= {'complete', 'error', 503}, set(kinds)
    assert not [o for o in answers if o[0] != 'complete' and secrets.search(o[1])]
    assert any('full' in text for kind, text in answers if kind != 'complete')
    assert demo.is_well() and demo.memory() - before < 400


# parts of it

def test_a_studio_computes_once_and_keeps_little(demo):
    studio = Studio(demo.models, most=3)
    a = studio.view('both', 'chelsea'); first = a.out
    assert studio.view('both', 'chelsea').out is first and studio.view('both', 'chelsea', seed=1) is not a
    for p in [o.name for o in sample_photos()][:6]: studio.view('both', p)
    assert len(studio._pictures) == len(studio._views) == 3
    demo_models = dict(demo.models); studio = Studio(demo_models); a = studio.view('both', 'chelsea')
    demo_models['both'] = mim_model('bootmae', **tiny | dict(seed=1)).eval()                     # a model that takes the place of another
    assert studio.view('both', 'chelsea').model is demo_models['both']


def test_the_guard_reads_all_of_a_body():
    check_body(b'{"path": "a.png", "url": "http://host/gradio_api/file=a.png", "text": "note: all, is well"}')
    for bad in b'[{"x": [{"url": "data:image/png;base64,A"}]}]', b'{"a": {"b": "https://x"}}', b'\xff\xfe', b'[1e400]', b'['*100_000:
        with pytest.raises(RequestError): check_body(bad)
    assert Guard(None, 5).max_upload == 5 + 64*1024


def test_the_newest_run_is_shown_first_and_the_packaged_model_last(tmp_path, monkeypatch):
    monkeypatch.setenv('BOOTMAE_RUN_DIR', str(tmp_path/'runs'))
    assert shown_names(find_models()) == dict(packaged='bootmae_tiny (packaged)') and find_models()['packaged'] == packaged_file()
    for i,name in enumerate(('old', 'new', 'packaged')):
        file = save_model(mim_model('mae', **tiny), tmp_path/'runs'/name/'model'); os.utime(file, (1e9 + i, 1e9 + i))
    assert shown_names(find_models(most=3)) == dict(packaged='packaged', new='new', bootmae_tiny='bootmae_tiny (packaged)')    # a run of that name keeps it
    shutil.rmtree(tmp_path/'runs'/'packaged')
    assert list(find_models()) == ['new', 'old', 'packaged'] and list(find_models('packaged')) == ['packaged']
    save_model(make_segmenter('packaged', ['a', 'b'], channels=8), tmp_path/'runs'/'segmenter'/'model')              # is for another command
    (tmp_path/'runs'/'damaged').mkdir(); (tmp_path/'runs'/'damaged'/'model.safetensors').write_bytes(b'no model')
    assert list(find_models()) == ['new', 'old', 'packaged']
    monkeypatch.setattr(checkpoints, 'files', lambda name: tmp_path)                               # installed without its model
    assert list(find_models()) == ['new', 'old']
    shutil.rmtree(tmp_path/'runs')
    with pytest.raises(CheckpointError, match='came without its model'): find_models()


def test_a_space_needs_the_two_folders_alone_and_no_fastai(tmp_path):
    space, blocked = tmp_path/'space', tmp_path/'blocked'
    shutil.copytree(root/'app', space); shutil.copytree(root/'bootmae_nb', space/'bootmae_nb', ignore=shutil.ignore_patterns('__pycache__'))
    blocked.mkdir(); (blocked/'fastai.py').write_text('raise ImportError("not on a Space")')
    env = dict(PYTHONPATH=str(blocked), BOOTMAE_RUN_DIR=str(space/'runs'), GRADIO_TEMP_DIR=str(tmp_path/'cache'))
    with running_demo(app=space/'app.py', log=tmp_path/'log', **env) as (url, _):
        client = Client(url, verbose=False, download_files=str(tmp_path/'client'))
        model = {o['parameter_name']: o for o in client.view_api(return_format='dict')['named_endpoints']['/reconstruct']['parameters']}['model']
        assert model['parameter_default'] == 'packaged' and model['type']['enum'] == ['packaged']
        assert client.predict(photo='rocket', api_name='/reconstruct')[-1]['image_size'] == [96, 96]
    assert '1 model: bootmae_tiny (packaged)' in (tmp_path/'log').read_text() and 'Traceback' not in (tmp_path/'log').read_text()


def test_importing_needs_no_fastai():
    code = "import sys, bootmae_nb.demo; print([m for m in ('fastai', 'pandas', 'sklearn', 'skimage') if m in sys.modules and m != 'pandas'])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


# in a browser

@pytest.fixture(scope='module')
def browser():
    path = find_chromium()
    if path is None: pytest.skip('NO BROWSER: the page of the demo is not tested. Install chromium, or name one in the variable CHROMIUM')
    with chromium(path) as browser: yield browser


def test_the_whole_page(demo, browser, cat, tmp_path):
    page = browser.new_page(viewport=dict(width=1280, height=900))
    outside, problems = [], []
    page.on('request', lambda r: outside.append(r.url) if urlparse(r.url).hostname != '127.0.0.1' and not r.url.startswith(('data:', 'blob:')) else None)
    page.on('console', lambda m: problems.append(m.text) if m.type == 'error' else None)
    page.on('pageerror', lambda e: problems.append(str(e)))
    state = lambda: {k: v[0] for k, v in parse_qs(urlparse(page.url).query).items()}
    hidden = lambda: int(page.locator('.facts b').first.inner_text())

    def changes(f):
        "Do something, and wait until the pictures are others"
        old = page.locator('#stage .slot').inner_html(); f()
        page.wait_for_function("o => document.querySelector('#stage .slot').innerHTML !== o", arg=old, timeout=30_000)

    page.goto(f'{demo.url}/?model=both&photo=china&mask=random&ratio=0.50&seed=3')
    page.wait_for_selector('#stage img', timeout=60_000)
    assert hidden() == 32 and page.locator('#stage img').count() == 2

    changes(lambda: page.get_by_role('button', name='Thumbnail 2 of').click())
    page.wait_for_function("new URL(location).searchParams.get('photo') === 'chelsea'")
    ratio = page.locator('#ratio input[type=number]')
    changes(lambda: (ratio.fill('0.75'), ratio.press('Enter')))
    page.wait_for_function("new URL(location).searchParams.get('ratio') === '0.75'")
    assert hidden() == 48 and state()['model'] == 'both'

    page.get_by_role('tab', name='Your picture').click()
    turned = tmp_path/'turned.png'; sample_photo('retina').resize((300, 200)).save(turned)
    changes(lambda: page.locator('#upload input[type=file]').set_input_files(turned))

    page.get_by_role('tab', name='Ask a patch').click()
    picture = page.locator('#ask img'); picture.wait_for(); page.wait_for_timeout(300)
    box = picture.bounding_box()
    picture.click(position=dict(x=box['width']*.95, y=box['height']*.05))
    page.get_by_text('patch 7 (outlined)').wait_for()
    assert page.locator('#patch input').input_value() == '7' and page.locator('#answer img').count() == 2

    page.evaluate('scrollTo(0, 0)')
    box = page.locator('canvas.paint').bounding_box()
    page.get_by_role('button', name='Show all').click()
    at = lambda col, row: (box['x'] + box['width']*(col + .5)/8, box['y'] + box['height']*(row + .5)/8)
    def drag():
        page.mouse.move(*at(1, 1)); page.mouse.down(); page.mouse.move(*at(5, 1), steps=3); page.mouse.up()
    changes(drag)
    page.wait_for_function("new URL(location).searchParams.get('mask') === 'hand'")
    assert hidden() == 5 and state()['hidden'] == '0'*9 + '1'*5 + '0'*50
    page.locator('canvas.paint').focus()
    changes(lambda: [page.keyboard.press(o) for o in ('ArrowDown', 'Space')])
    assert hidden() == 6

    with page.expect_download() as download: page.get_by_role('button', name='Download').click()
    download.value.save_as(tmp_path/'sheet.png')
    assert Image.open(io.BytesIO((tmp_path/'sheet.png').read_bytes())).width > 1000

    for name in 'Features as colours', 'Pixels', 'For programs': page.get_by_role('tab', name=name).click()
    page.locator('#right').get_by_text('gradio_client').first.wait_for()
    bad = tmp_path/'page.png'; bad.write_text('<html>')
    page.get_by_role('button', name='Remove Image').click()
    page.locator('#upload input[type=file]').set_input_files(bad)
    page.get_by_text('The picture holds a web page').first.wait_for()
    assert not outside and not problems, (outside, problems)
    page.close()


@pytest.mark.parametrize('size', [(1280, 800), (390, 844)])
def test_everything_fits_the_width_and_has_a_name(demo, browser, size):
    page = browser.new_page(viewport=dict(width=size[0], height=size[1]))
    page.goto(demo.url); page.wait_for_selector('#stage img', timeout=60_000)
    assert page.evaluate('document.documentElement.scrollWidth') <= size[0]
    nameless = page.evaluate("""() => [...document.querySelectorAll('input, button, textarea, select, canvas, img')]
        .filter(o => o.offsetParent && o.type !== 'file' && !(o.getAttribute('aria-label') || o.labels && o.labels.length || o.textContent.trim()
            || o.alt || o.title || o.closest('label'))).map(o => o.outerHTML.slice(0, 200))""")
    assert not nameless, nameless
    page.close()
