"""A folder as folders are: every file of the corpus alone, in a scan, and in training; what a scan remembers; files that go bad while training runs."""
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from fastai.torch_basics import Transform
from fastai.vision.augment import Resize
from fastai.vision.data import ImageDataLoaders
from PIL import Image

import bootmae_nb.data as data
from bootmae_nb.data import OpenImage, SeededDL, check_images, find_bad, mim_dls
from bootmae_nb.images import ImageError, image_files, image_size, open_image, sample_photos
from bootmae_nb.learner import mim_learner
from common import quietly
from corpus import VERDICTS, make_corpus

root = Path(__file__).parents[1]
tiny = dict(arch='vit_tiny_patch16_224', width=48, depth=1, heads=3, patch_size=8, pixel_width=48, pixel_depth=1)


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    "All files of the corpus and three photographs"
    folder = tmp_path_factory.mktemp('corpus')
    cases = make_corpus(folder)
    for o in sample_photos()[:3]: Image.open(o.path).convert('RGB').resize((96, 64)).save(folder/f'photo_{o.name}.jpg')
    return folder, cases


def is_good(o): return o.good or o.needs_user and os.geteuid() == 0
def good_names(folder, cases): return {str(o.path) for o in cases if is_good(o)} | {str(o) for o in folder.glob('photo_*.jpg')}
def bad_names(cases, *verdicts): return {str(o.path) for o in cases if not is_good(o) and o.listed and o.verdict in (verdicts or VERDICTS)}


@contextmanager
def nobody():
    "As a user who may read nothing of root's"
    if os.geteuid(): yield; return
    os.seteuid(65534)
    try: yield
    finally: os.seteuid(0)


def recorded(f):
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        return f(), [str(o.message) for o in w]


def table_of_the_notebook():
    nb = nbformat.read(root/'nbs'/'02_images.ipynb', 4)
    tables = [o.source for o in nb.cells if o.cell_type == 'markdown' and o.source.startswith('| file | verdict |')]
    assert len(tables) == 1
    return [tuple(c.strip() for c in line.strip('|').split('|')) for line in tables[0].splitlines()[2:]]


# ---- each file


def test_the_table_of_the_notebook_and_the_corpus_have_the_same_rows(corpus):
    rows = table_of_the_notebook()
    assert [o[:2] for o in rows] == list(dict.fromkeys((o.name, o.verdict) for o in corpus[1]))
    assert len(rows) >= 31 and all(len(o) == 3 and o[2] for o in rows) and {o[1] for o in rows} == set(VERDICTS)


def test_accepted_files_come_out_as_they_should(corpus):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for o in corpus[1]:
            if not o.good: continue
            x = open_image(o.path)
            assert x.mode == 'RGB' and np.asarray(x).shape == o.pixels.shape, o.name
            assert np.abs(np.asarray(x).astype(int) - o.pixels).max() <= o.tol, o.name
            assert image_size(o.path) in (x.size, x.size[::-1]), o.name


def test_refused_files_say_so_in_one_sentence_that_names_them(corpus):
    for o in corpus[1]:
        if o.good or o.needs_user: continue
        with pytest.raises(ImageError, match=o.says) as e: open_image(o.path)
        said = str(e.value)
        assert said.startswith((str(o.path), repr(str(o.path)))) and said.isprintable() and len(said) < len(str(o.path)) + 250, o.name
        said.encode()
        if o.verdict == 'refused':
            with pytest.raises(ImageError, match=o.says): image_size(o.path)
        else: image_size(o.path)


def test_a_file_without_permission(corpus):
    (case,) = [o for o in corpus[1] if o.needs_user]
    folder = Path(tempfile.mkdtemp())
    try:
        shutil.copy(case.path, folder/'locked.png'); (folder/'locked.png').chmod(0); folder.chmod(0o755)
        try:
            with nobody(), pytest.raises(ImageError, match=case.says) as e: open_image(folder/'locked.png')
        except PermissionError: pytest.skip('root could not become another user here, and root may read anything')
        assert 'damaged' not in str(e.value)
    finally: shutil.rmtree(folder)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path/'closed').mkdir(); Image.new('RGB', (4, 4)).save(tmp_path/'a.png')
    real = os.scandir
    def scandir(path):
        if str(path).endswith('closed'): raise PermissionError(13, 'Permission denied', str(path))
        return real(path)
    monkeypatch.setattr(os, 'scandir', scandir)
    files, said = recorded(lambda: image_files(tmp_path))
    assert files == [tmp_path/'a.png'] and len(said) == 1 and 'closed cannot be listed (Permission denied)' in said[0]


def test_warning_filters_are_as_before_also_with_threads(corpus):
    before = list(warnings.filters)
    files = [o.path for o in corpus[1] if o.listed] * 5
    opener = OpenImage()
    find_bad(files, opener, cache=0, full=True)
    assert warnings.filters == before


# ---- all files in one folder


def loaders(source, **kw): return mim_dls(source, **dict(img_size=32, bs=8, num_workers=0, device='cpu', crops_per_image=1) | kw)


def test_a_scan_names_every_bad_file_and_keeps_every_good_one(corpus):
    folder, cases = corpus
    for kw in dict(), dict(scan='full'), dict(scan='full', cache=0):
        dls, said = recorded(lambda: loaders(folder, **kw)) # noqa: B023
        assert set(dls.left_out) == bad_names(cases) and len(said) == 1 and said[0].startswith(f'{len(dls.left_out)} of ')
        assert {str(o) for o in [*dls.train_ds.items, *dls.valid_ds.items]} == good_names(folder, cases)
        assert all(re.search(o.says, dls.left_out[str(o.path)]) for o in cases if str(o.path) in dls.left_out)
    dls, _ = recorded(lambda: loaders(folder, cache=0))
    assert set(dls.left_out) == bad_names(cases, 'refused'), 'headers alone'
    assert recorded(lambda: loaders(folder, scan=False))[0].left_out == {}


def test_raising_names_the_first(corpus):
    folder, cases = corpus
    with pytest.raises(ImageError) as e: loaders(folder, on_bad='raise')
    first = min(bad_names(cases))
    assert str(e.value).startswith((first, repr(first)))


@pytest.mark.parametrize('scan', [True, False])
@pytest.mark.parametrize('workers', [0, 2])
def test_an_epoch_survives_every_file(corpus, scan, workers):
    "Scanned: what only decoding shows is met in training. Not scanned: all of it is"
    folder, cases = corpus
    dls, said = recorded(lambda: loaders(folder, scan=scan, cache=0, valid_pct=.1, num_workers=workers))
    learn, _ = recorded(lambda: mim_learner(dls, **tiny, seed=0))
    _, more = recorded(lambda: quietly(learn, 'fit', 1, 1e-3))
    met = {o for dl in learn.dls.loaders for o in dl.bad_files()}
    assert met == (bad_names(cases, 'skipped in training') if scan else bad_names(cases)) and torch.tensor(learn.recorder.values[-1]).isfinite().all()
    assert len(learn.recorder.values) == 1 and len(learn.recorder.losses) == len(dls.train)
    if not scan: return
    told = [o for o in [*said[1:], *more] if 'Another image takes its place' in o]
    assert len(told) <= len(met) and all(sum(Path(o).name in t for t in told) <= 1 for o in met)


# ---- what a scan remembers


@pytest.fixture
def many(tmp_path, monkeypatch):
    "Thirty small JPEGs that nobody changed lately, a cut one and an empty one; every scan is worth remembering"
    folder = tmp_path/'many'; folder.mkdir()
    for i in range(30): Image.effect_noise((40, 30), 50 + i).convert('RGB').save(folder/f'{i:02}.jpg')
    (folder/'cut.jpg').write_bytes((folder/'00.jpg').read_bytes()[:-400]); (folder/'empty.jpg').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    monkeypatch.setattr(data, '_WORTH', 0); monkeypatch.setattr(data, '_SETTLED', -60)
    return folder


def scan(folder, full=True, **kw):
    "Names of bad files, and how many files were opened for it"
    opened, opener = [], OpenImage(**kw)
    real_size, real_open = data.image_size, data.open_image
    data.image_size = lambda o, *a, **k: (opened.append(o), real_size(o, *a, **k))[1]
    data.open_image = lambda o, *a, **k: (opened.append(o), real_open(o, *a, **k))[1]
    try:
        files = image_files(folder)
        return [files[i].name for i in find_bad(files, opener, cache=0, full=full)], len(set(opened))
    finally: data.image_size, data.open_image = real_size, real_open


BAD = ['cut.jpg', 'empty.jpg']


def memory(many): return list((many.parent/'cache').rglob('*.json'))


def test_the_second_scan_opens_only_what_was_bad(many):
    assert scan(many) == (BAD, 32) and scan(many) == (BAD, 2) and len(memory(many)) == 1
    assert scan(many, max_pixels=10**6) == (BAD, 32), 'other settings, another look'
    assert scan(many, full=False) == (['empty.jpg'], 1), 'a header of a whole image is known too'


def test_headers_do_not_count_as_decoded(many):
    assert scan(many, full=False) == (['empty.jpg'], 32) and scan(many, full=False) == (['empty.jpg'], 1)
    assert scan(many) == (BAD, 32) and scan(many) == (BAD, 2)


def test_changed_files_are_looked_at_again(many):
    scan(many)
    whole = (many/'05.jpg').read_bytes()
    st = (many/'05.jpg').stat()
    (many/'05.jpg').write_bytes(whole[:-300] + bytes(300)); os.utime(many/'05.jpg', ns=(st.st_atime_ns, st.st_mtime_ns))
    Image.new('RGB', (9, 9)).save(many/'new.png')
    (many/'cut.jpg').write_bytes(whole)
    names, n = scan(many)
    assert n == 4 and 'empty.jpg' in names and 'cut.jpg' not in names  # 05: same size, same time of its content
    (many/'06.jpg').write_bytes(whole[:500])
    assert '06.jpg' in scan(many)[0]


def test_files_that_have_just_changed_are_not_remembered(many, monkeypatch):
    monkeypatch.setattr(data, '_SETTLED', 2)
    assert scan(many) == (BAD, 32) and scan(many) == (BAD, 32) and memory(many) == []


def test_quick_scans_are_not_remembered(many, monkeypatch):
    monkeypatch.setattr(data, '_WORTH', 60)
    assert scan(many) == (BAD, 32) and memory(many) == []


@pytest.mark.parametrize('damage', [b'', b'{}', b'\xff\xfe', b'not json', 'cut', 'bit', 'folder'])
def test_a_damaged_memory_is_none(many, damage):
    scan(many)
    (file,) = memory(many)
    whole = file.read_bytes()
    if damage == 'folder': file.unlink(); file.mkdir()
    else: file.write_bytes(whole[:-5] if damage == 'cut' else whole.replace(b'00.jpg', b'01.jpg', 1) if damage == 'bit' else damage)
    assert scan(many) == (BAD, 32)
    if damage != 'folder': assert scan(many) == (BAD, 2)
    assert not [o for o in file.parent.iterdir() if o.name.startswith('.')], 'no temporary files stay'


def test_without_a_place_nothing_is_remembered_and_nothing_fails(many, monkeypatch):
    (many.parent/'file').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(many.parent/'file'))
    assert scan(many) == (BAD, 32) and scan(many) == (BAD, 32)
    monkeypatch.delenv('XDG_CACHE_HOME'); monkeypatch.setenv('HOME', str(many.parent/'home'))
    assert scan(many) == (BAD, 32) and scan(many) == (BAD, 2) and (many.parent/'home'/'.cache'/'bootmae_nb').is_dir()
    def homeless(): raise RuntimeError('Could not determine home directory.')
    monkeypatch.setattr(data.Path, 'home', homeless)
    assert scan(many) == (BAD, 32)


def _scan_in_a_process(folder): return scan(Path(folder))[0]


def test_scans_at_the_same_time_do_no_harm(many):
    stop, broken = threading.Event(), []
    def reader():
        while not stop.is_set():
            for o in memory(many):
                text = o.read_text().partition('\n')
                if data._digest(text[2]) != text[0]: broken.append(o)
    thread = threading.Thread(target=reader); thread.start()
    try:
        with ProcessPoolExecutor(2, get_context('fork')) as pool: assert list(pool.map(_scan_in_a_process, [many]*8)) == [BAD]*8
    finally: stop.set(); thread.join()
    assert not broken and scan(many) == (BAD, 2)


def test_a_memory_that_cannot_be_replaced_stays_whole(many, monkeypatch):
    scan(many); (file,) = memory(many); whole = file.read_bytes()
    Image.new('RGB', (9, 9)).save(many/'new.png')
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'replace', full)
    assert scan(many) == (BAD, 3) and file.read_bytes() == whole and list(file.parent.iterdir()) == [file]


def test_two_lists_of_one_folder_share_a_memory(many):
    files = image_files(many)
    find_bad(files[:20], OpenImage(), cache=0, full=True); find_bad(files[10:], OpenImage(), cache=0, full=True)
    assert len(memory(many)) == 1 and scan(many) == (BAD, 2)
    rows = json.loads(memory(many)[0].read_text().partition('\n')[2])
    assert {k for k, v in rows.items() if v[2]} == {f'/{i:02}.jpg' for i in range(30)} and rows['/cut.jpg'][2] == 0
    (many/'03.jpg').unlink(); Image.new('RGB', (9, 9)).save(many/'04.jpg'); scan(many)
    assert '/03.jpg' not in json.loads(memory(many)[0].read_text().partition('\n')[2]), 'what is gone is forgotten'


def test_images_without_files_are_scanned_too(many):
    items = [np.zeros((4, 4), np.uint8), Image.new('RGB', (3, 3)), np.zeros((1, 5000), np.uint8)]
    assert list(find_bad(items, OpenImage(), full=True)) == list(find_bad(items, OpenImage(), cache=0, full=True)) == [2] and memory(many) == []


def test_check_images(many):
    table = check_images(many)
    assert list(table.columns) == ['file', 'verdict', 'reason'] and len(table) == 32 and [Path(o).name for o in table.file[:2]] == BAD
    assert table.reason.iloc[1].startswith('is empty (0 bytes)') and set(table.verdict[2:]) == {'accepted'} and not table.reason[2:].any()
    assert list(check_images(many, only_bad=True).index) == [30, 31] and len(check_images(many, only_bad=True, full=False)) == 1
    assert list(check_images([np.zeros((4, 4)), np.zeros((1, 5000))], only_bad=True).file) == ['item 1']
    assert len(check_images(['00.jpg', 'empty.jpg'], pref=many, only_bad=True)) == 1


def test_scan_is_one_of_three(many):
    with pytest.raises(ValueError, match="scan='all' is unknown: choose True"): loaders(many, scan='all')


# ---- files that go bad while training runs


@pytest.fixture
def photos(tmp_path):
    for i in range(8): Image.effect_noise((40, 30), 20 + 10*i).convert('RGB').save(tmp_path/f'{i}.png')
    return tmp_path


def batches(dl): return [b[0] for b in dl]


def fails_to_read(file, monkeypatch):
    real = Image.open
    def open_or_fail(fp, *args, **kw):
        if str(fp) == str(file): raise OSError(5, 'Input/output error', str(fp))
        return real(fp, *args, **kw)
    monkeypatch.setattr(Image, 'open', open_or_fail)


CHANGES = {
    'deleted': (lambda f, m: f.unlink(), 'does not exist'),
    'cut': (lambda f, m: f.write_bytes(f.read_bytes()[:200]), 'truncated or damaged'),
    'emptied': (lambda f, m: f.write_bytes(b''), 'is empty'),
    'a folder now': (lambda f, m: (f.unlink(), f.mkdir()), 'is a folder'),
    'disk error': (fails_to_read, r'cannot be read \(Input/output error\): check the path, its permissions and the disk')}


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('change', CHANGES)
def test_a_file_that_goes_bad_is_replaced_named_once_and_listed(photos, change, workers, monkeypatch):
    dls = loaders(photos, cache=0, crops_per_image=4, bs=4, num_workers=workers)
    first = batches(dls.train)
    file = Path(dls.train_ds.items[2])
    assert dls.train.bad_files() == []
    CHANGES[change][0](file, monkeypatch)
    passes, said = recorded(lambda: [batches(dls.train) for _ in range(2)])
    assert [len(o) for o in passes] == [len(first)]*2 and all(o.shape == first[0].shape for p in passes for o in p)
    said = [o for o in said if 'takes its place' in o]
    assert len(said) == 1 and said[0].startswith(f'{file} ') and re.search(CHANGES[change][1], said[0]) and '\n' not in said[0]
    assert dls.train.bad_files() == [str(file)] and dls.valid.bad_files() == []
    assert dls.train.new().bad_files() == [str(file)] and dls.train.new(dls.valid_ds).bad_files() == []


def test_marked_files_are_left_out_without_a_word_and_change_nothing(photos):
    "What a resumed run does: the same batches as the run that found out by itself"
    make = lambda: loaders(photos, cache=0, crops_per_image=4, bs=4)
    a, b = make(), make()
    file = Path(a.train_ds.items[3]); content = file.read_bytes(); file.unlink()
    want, _ = recorded(lambda: batches(a.train))
    file.write_bytes(content)
    b.train.mark_bad([*a.train.bad_files(), 'never/heard/of.png'])
    got, said = recorded(lambda: batches(b.train))
    assert all(torch.equal(x, y) for x, y in zip(want, got)) and said == [] and b.train.bad_files() == [str(file)]
    loaders(photos, on_bad='raise').train.mark_bad([file])


def test_workers_and_none_agree_about_the_batches(photos):
    made = [loaders(photos, cache=0, crops_per_image=4, bs=4, num_workers=n) for n in (0, 2)]
    Path(made[0].train_ds.items[1]).unlink()
    (a, b), _ = recorded(lambda: [batches(o.train) for o in made])
    assert all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize('workers', [0, 2])
def test_when_all_files_have_gone_there_is_one_clear_error(photos, workers):
    dls = loaders(photos, cache=0, crops_per_image=2, bs=4, num_workers=workers)
    batches(dls.train)
    shutil.rmtree(photos)
    def go():
        with pytest.raises(ImageError, match=r'^none of the 14 images can be read \(the last one: .*does not exist') as e: batches(dls.train)
        assert '\n' not in str(e.value)
    _, said = recorded(go)
    assert len({o for o in said if 'does not exist' in o}) == 7


def test_thousands_of_lost_files_cost_neither_time_nor_lines(tmp_path):
    files = [tmp_path/f'{i}.png' for i in range(3_000)]
    Image.new('RGB', (8, 8)).save(tmp_path/'2999.png')
    dls, said = recorded(lambda: loaders(files, scan=False, valid_pct=0, bs=64))
    start = time.perf_counter()
    b, said = recorded(lambda: next(iter(dls.train)))
    assert b[0].shape == (64, 3, 32, 32) and time.perf_counter() - start < 60
    told = [o for o in said if 'takes its place' in o]
    assert len(told) == 20 and 'bad_files() lists' in told[-1] and len(dls.train.bad_files()) > 500


@pytest.mark.parametrize('workers', [0, 1])
def test_a_raising_loader_names_the_file_in_one_line(photos, workers):
    dls = loaders(photos, cache=0, on_bad='raise', num_workers=workers)
    Path(dls.train_ds.items[0]).unlink()
    with pytest.raises(ImageError, match='does not exist: check the spelling') as e: batches(dls.train)
    assert str(e.value).startswith(str(dls.train_ds.items[0])) and '\n' not in str(e.value)


def converted(photos, workers, **kw):
    files = image_files(photos)
    dls = ImageDataLoaders.from_lists(photos, files, ['a']*len(files), bs=4, item_tfms=Resize(24), device='cpu', num_workers=0, valid_pct=.2, seed=0)
    return dls.train.new(cls=SeededDL, seed=1, num_workers=workers, **kw)


@pytest.mark.parametrize('workers', [0, 1])
def test_other_exceptions_keep_their_type_and_name_the_item(photos, workers):
    "fastai's own opener says `image file is truncated`, and not which"
    dl = converted(photos, workers)
    file = Path(dl.dataset.items[0][0]); file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(OSError) as e: batches(dl)
    whole = str(e.value) + '\n'.join(getattr(e.value, '__notes__', []))
    assert f'This happened while {file} was loaded.' in whole


class Wrong(Transform):
    def encodes(self, o: Image.Image): raise KeyError('label')


@pytest.mark.parametrize('workers', [0, 1])
def test_mistakes_of_a_program_are_not_skipped(photos, workers):
    dls = loaders(photos, cache=0, num_workers=workers)
    dls.train.after_item.add(Wrong())
    with pytest.raises(KeyError) as e: batches(dls.train)
    assert '.png was loaded.' in str(e.value) + '\n'.join(getattr(e.value, '__notes__', [])) and dls.train.bad_files() == []


def test_images_without_files_have_numbers():
    items = [np.full((20, 20), 9, np.uint8) for _ in range(5)] + [np.zeros((1, 5000), np.uint8)]
    dls = loaders(items, scan=False, crops_per_image=3, valid_pct=0, bs=4)
    _, said = recorded(lambda: batches(dls.train))
    assert dls.train.bad_files() == ['item 5'] and len([o for o in said if 'takes its place' in o]) == 1 and int(dls.train.bad.sum()) == 3
    other = loaders(items, scan=False, crops_per_image=3, valid_pct=0, bs=4)
    other.train.mark_bad(['item 5'])
    assert int(other.train.bad.sum()) == 3


def test_python_shows_the_note(photos, capsys):
    "What a user sees of it: the last line of the traceback"
    dl = converted(photos, 0)
    file = Path(dl.dataset.items[0][0]); file.write_bytes(file.read_bytes()[:300])
    try: batches(dl)
    except OSError as e: sys.excepthook(type(e), e, e.__traceback__)
    assert capsys.readouterr().err.strip().splitlines()[-1] == f'This happened while {file} was loaded.'
