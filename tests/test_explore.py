"""The explorer without a browser: controls drive the state, pictures equal those of `viz`, nothing is computed twice. And once in a real JupyterLab."""
import io
import json
import pickle
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bootmae_nb import explore as ex
from bootmae_nb.checkpoints import save_model
from bootmae_nb.explore import Explorer, PatchCanvas, explore, named_images, named_models
from bootmae_nb.images import sample_photo
from bootmae_nb.masking import BlockMask, FixedMask, RandomMask
from bootmae_nb.models import MaskedAutoencoder, mim_model
from bootmae_nb.viz import View
from jupyter_browser import browser_page, find_chromium, jupyter_lab, run_all, write_notebook

tiny = dict(arch='vit_tiny_patch16_224', img_size=(32, 48), patch_size=8, width=48, depth=2, heads=3)
L = 24


@pytest.fixture(scope='module')
def models(): return {name: mim_model(name, seed=i, **tiny) for i, name in enumerate(['bootmae', 'mae', 'dbot'])}


@pytest.fixture(scope='module')
def photos(): return {name: sample_photo(name) for name in ('coffee', 'chelsea')}


@pytest.fixture
def explorer(models, photos): return explore(models, photos, seed=3)


@pytest.fixture
def calls(monkeypatch):
    "How often models predicted and teachers looked."
    count = Counter()
    def counted(name):
        old = getattr(MaskedAutoencoder, name)
        def f(*args, **kw):
            count[name] += 1
            return old(*args, **kw)
        return f
    for name in 'forward', 'teacher_features': monkeypatch.setattr(MaskedAutoencoder, name, counted(name))
    return count


def shown(explorer):
    "The picture of the visible tab, as the browser gets it."
    return np.asarray(Image.open(io.BytesIO(explorer.panes[explorer.tab].image.value)))


def go(explorer, tab): explorer.tabs.selected_index = list(explorer.panes).index(tab)


def upload(explorer, **files):
    explorer.upload.files = list(files.items())


# state

def test_it_starts_with_the_mask_of_the_method(explorer, models, photos):
    same = View(models['bootmae'], photos['coffee'], seed=3)
    assert torch.equal(explorer.view.mask, same.mask) and not explorer.by_hand and '18 of 24' in explorer.about.value
    assert np.array_equal(shown(explorer), ex.reconstruction_picture(same, explorer.high)[0])
    assert Image.open(io.BytesIO(explorer.canvas.image)).size == (48, 32) and explorer.canvas.grid == [4, 6]


def test_the_controls_of_the_mask_make_it(explorer, models, photos):
    def same(masker, seed=3): return torch.equal(explorer.view.mask, View(models['bootmae'], photos['coffee'], masker, seed).mask)
    explorer.kind.value = 'random'; assert same(RandomMask(.75))
    explorer.ratio.value = .5; assert same(RandomMask(.5)) and '12 of 24' in explorer.about.value
    explorer.redraw.click(); assert same(RandomMask(.5), 4) and explorer.seed.value == 4
    explorer.kind.value = 'block'; explorer.area.value = (.1, .2)
    assert same(BlockMask(.5, block_ratio=120/147*.5, min_area=.1, max_area=.2), 4)
    explorer.kind.value = 'grid'; assert len(explorer.canvas.mask) == 18 and explorer.ratio.layout.display == 'none' and explorer.cell.layout.display == ''
    explorer.cell.value = 3; assert len(explorer.canvas.mask) == 20


def test_a_mask_by_hand_is_the_one_that_is_shown(explorer, models, photos):
    before = shown(explorer)
    explorer.canvas.mask = [0, 1, 6, 7]
    hidden = torch.zeros(L, dtype=torch.bool); hidden[[0, 1, 6, 7]] = True
    same = View(models['bootmae'], photos['coffee'], hidden)
    assert explorer.by_hand and torch.equal(explorer.view.mask, same.mask) and 'by hand' in explorer.about.value
    assert np.array_equal(shown(explorer), ex.reconstruction_picture(same, explorer.high)[0]) and not np.array_equal(shown(explorer), before)
    explorer.image.value = 'chelsea'; assert explorer.canvas.mask == [0, 1, 6, 7]                   # another image keeps it
    explorer.ratio.value = .5; assert not explorer.by_hand and len(explorer.canvas.mask) == 12      # another ratio does not


def test_another_image_and_another_model(explorer, models, photos):
    mask, before = explorer.canvas.mask, explorer.canvas.image
    explorer.image.value = 'chelsea'; assert explorer.canvas.image != before
    explorer.model.value = 'mae'
    same = View(models['mae'], photos['chelsea'], FixedMask(explorer.hidden))
    assert explorer.canvas.mask == mask and np.array_equal(shown(explorer), ex.reconstruction_picture(same, explorer.high)[0])


def test_asking_for_a_patch_opens_its_tab(explorer, models, photos):
    explorer.canvas.clicked = 7
    assert (explorer.tab, explorer.canvas.mode, explorer.mode.value) == ('Patch query', 'query', 'query')
    first = shown(explorer)
    assert np.array_equal(first, ex.query_picture(View(models['bootmae'], photos['coffee'], seed=3), 7, True, explorer.high)[0])
    explorer.canvas.clicked = 8; second = shown(explorer); assert not np.array_equal(first, second)
    explorer.centred.value = False; assert not np.array_equal(shown(explorer), second)
    go(explorer, 'Similarity'); assert explorer.canvas.mode == 'mask'
    explorer.canvas.clicked = 9; assert explorer.tab == 'Patch query'


@pytest.mark.parametrize('tab', ex.tab_texts)
def test_each_tab_has_its_picture_and_its_words(explorer, tab):
    go(explorer, tab)
    pane = explorer.panes[tab]
    assert not explorer.message.value and pane.numbers.value and not pane.image.layout.display and shown(explorer).std() > 10
    assert np.array_equal(shown(explorer), explorer.render()[0])
    assert explorer.figure().height > shown(explorer).shape[0] + explorer.high


def test_what_a_browser_sends_is_cut_to_what_exists():
    canvas = PatchCanvas(grid=[2, 3])
    canvas.mask = [7, -1, 5, 5, 0]; assert canvas.mask == [0, 5]
    canvas.clicked = 99; assert canvas.clicked == -1


# what is computed

def test_nothing_is_computed_before_it_is_seen_or_twice(explorer, calls):
    go(explorer, 'Error and weight'); go(explorer, 'Reconstruction'); assert not calls       # the prediction was there
    go(explorer, 'Similarity'); assert calls['forward'] == 0 and calls['teacher_features'] >= 1
    calls.clear()
    explorer.canvas.clicked = 3; explorer.canvas.clicked = 4; explorer.centred.value = False
    go(explorer, 'Colours'); go(explorer, 'Similarity'); assert not calls                     # nor anything for another question
    explorer.canvas.mask = [0, 1]; assert calls == dict(forward=1)                            # the teacher's answer does not depend on the mask
    explorer.image.value = 'chelsea'; assert calls == dict(forward=2, teacher_features=1)
    explorer.image.value = 'coffee'; assert calls == dict(forward=3, teacher_features=1)      # known from before


def test_a_mask_is_computed_once_for_each_change(explorer, calls):
    explorer.ratio.value = .5; assert calls == dict(forward=1)
    explorer.model.value = 'mae'; assert calls == dict(forward=2)
    explorer.ratio.value = .5; assert calls == dict(forward=2)
    explorer.mode.value = 'query'; assert calls == dict(forward=2)


def test_only_the_tab_that_is_seen_is_drawn(explorer, monkeypatch):
    drawn, render = [], Explorer.render
    monkeypatch.setattr(Explorer, 'render', lambda self, tab=None: drawn.append(tab or self.tab) or render(self, tab))
    explorer.ratio.value = .5; explorer.redraw.click(); assert drawn == ['Reconstruction']*2
    go(explorer, 'Colours'); go(explorer, 'Reconstruction'); assert drawn == ['Reconstruction']*2 + ['Colours']


def test_views_are_not_kept_for_ever(models):
    explorer = explore(models['bootmae'], [np.full((32, 48, 3), i*10, np.uint8) for i in range(15)])
    for name in explorer.images: explorer.image.value = name
    assert len(explorer._views) == 12


# models and images

def test_comparing_needs_one_mask_and_says_so(models, photos):
    other = mim_model('mae', **tiny | dict(patch_size=16))
    explorer = explore({'a': models['bootmae'], 'b': models['mae'], 'c': other}, photos, tab='Compare')
    assert explorer.same_grid == ['a', 'b'] and 'does not fit c (2 x 3)' in explorer.panes['Compare'].numbers.value
    assert torch.equal(explorer.view_by('a').mask, explorer.view_by('b').mask)
    explorer.canvas.clicked = 20; explorer.model.value = 'c'
    assert explorer.canvas.grid == [2, 3] and 'c has a grid of 2 x 3 patches, not 4 x 6' in explorer.message.value
    assert 'needs a model with a feature decoder' in explorer.message.value            # both sentences stay
    assert explorer.view.mask.shape == (1, 6) and explorer.canvas.clicked < 6 and all(i < 6 for i in explorer.canvas.mask)


def test_one_model_has_nothing_to_compare(models, photos):
    explorer = explore(models['bootmae'], photos)
    assert 'Compare' not in explorer.panes and explorer.model not in explorer.widget.children[0].children[1].children
    with pytest.raises(ValueError, match='to compare, give several models'): explore(models['bootmae'], photos, tab='Compare')


def test_checkpoints_by_name(models, tmp_path):
    path = save_model(models['mae'], tmp_path/'run'/'model'); other = save_model(models['mae'], tmp_path/'late')
    assert list(named_models([path, tmp_path/'run', other])) == ['run', 'run (2)', 'late']
    with pytest.raises(ValueError, match='4 models were given'): named_models([path]*4)
    with pytest.raises(ValueError, match='is not there'): explore(tmp_path/'none.safetensors')


def test_images_from_anywhere(tmp_path):
    for name in 'b.png', 'a.jpg': Image.new('RGB', (40, 30), 'red').save(tmp_path/name)
    (tmp_path/'a').mkdir(); Image.new('RGB', (9, 9)).save(tmp_path/'a'/'b.png')
    assert list(named_images(tmp_path)) == ['a.jpg', 'b.png', 'b.png (2)'] and list(named_images(tmp_path, 1)) == ['a.jpg']
    assert list(named_images(tmp_path/'a.jpg')) == ['a.jpg'] and 'grace hopper' in named_images()
    with pytest.raises(ValueError, match='no images were given'): named_images([])


def test_a_given_mask(models, photos):
    hidden = np.zeros((4, 6), bool); hidden[1:3, 2:5] = True
    explorer = explore(models, photos, mask=torch.from_numpy(hidden))
    assert explorer.by_hand and np.array_equal(explorer.hidden, hidden)
    assert explore(models, photos, mask='random').kind.value == 'random'
    with pytest.raises(ValueError, match="mask kind 'rnd' is unknown"): explore(models, photos, mask='rnd')


# what goes wrong

def test_an_error_is_a_sentence_and_no_old_picture_stays(explorer):
    explorer.clear.click()
    assert 'the mask hides 0 of 24 patches' in explorer.message.value and explorer.panes['Reconstruction'].image.layout.display == 'none'
    explorer.canvas.mask = list(range(L)); assert 'the mask hides 24 of 24 patches' in explorer.message.value
    explorer.canvas.mask = [3]
    assert not explorer.message.value and not explorer.panes['Reconstruction'].image.layout.display
    explorer.model.value = 'dbot'; assert 'needs a model with a pixel decoder' in explorer.message.value
    explorer.figure()
    go(explorer, 'Similarity'); assert not explorer.message.value


def test_uploads_go_through_the_one_opener(explorer):
    good = io.BytesIO(); Image.fromarray(np.full((30, 40), 40000, np.uint16)).save(good, 'png')
    before = explorer.image.value
    upload(explorer, **{'<b>.png': b'hello, this is text', 'none.jpg': b''})
    assert explorer.image.value == before and explorer.upload.files == []
    assert '&lt;b&gt;.png holds text, not an image' in explorer.message.value and 'none.jpg is empty' in explorer.message.value
    upload(explorer, **{'coffee': good.getvalue(), 'bad.png': good.getvalue()[:60]})
    assert explorer.image.value == 'coffee (2)' and 'bad.png' in explorer.message.value
    explorer.upload.files = [('huge.png', None)]; assert 'huge.png has more than 64 MB' in explorer.message.value and explorer.image.value == 'coffee (2)'
    assert abs(int(np.asarray(explorer.view.picture)[0, 0, 0]) - 40000/257) < 2


def test_a_file_that_is_gone(models, tmp_path):
    (tmp_path/'broken.png').write_bytes(b'\x89PNG\r\n\x1a\n broken'); Image.new('RGB', (40, 30), 'red').save(tmp_path/'fine.png')
    explorer = explore(models['bootmae'], tmp_path)
    assert 'broken.png' in explorer.message.value and 'image/png' not in explorer._repr_mimebundle_()
    explorer.image.value = 'fine.png'; assert not explorer.message.value and shown(explorer).size


def test_it_shows_itself_and_a_picture_of_itself(explorer):
    bundle = explorer._repr_mimebundle_()
    assert bundle['text/plain'] == 'Explorer(bootmae, mae, dbot; 2 images)' and 'application/vnd.jupyter.widget-view+json' in bundle
    assert np.array_equal(Image.open(io.BytesIO(bundle['image/png'])), explorer.figure())


def test_the_model_stays_as_it_was(models, photos):
    model = models['bootmae'].train()
    explore(model, photos, tab='Colours')
    assert model.training; model.eval()


def test_looking_needs_no_fastai():
    code = 'import sys, bootmae_nb.explore; sys.exit("fastai" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_the_notebook_holds_pictures_and_no_widgets():
    nb = json.loads((Path(__file__).parents[1]/'nbs'/'19_explore.ipynb').read_text(encoding='utf-8'))
    views = [o for c in nb['cells'] for o in c.get('outputs', []) if 'application/vnd.jupyter.widget-view+json' in o.get('data', {})]
    assert 'widgets' not in nb['metadata'] and not views, 'run: python tools/static_widgets.py nbs/19_explore.ipynb'


# watching

@pytest.fixture
def training():
    "Makes learners of four steps an epoch, and fits them without a word."
    from fastai.callback.core import Callback
    from bootmae_nb.data import mim_dls
    from bootmae_nb.learner import mim_learner

    def learner(method='bootmae', **kw):
        images = [np.random.default_rng(i).integers(0, 255, (32, 48, 3), np.uint8) for i in range(20)]
        dls = mim_dls(images, img_size=(32, 48), bs=4, num_workers=0, valid_pct=.2, crops_per_image=1, min_scale=.9, seed=0)
        return mim_learner(dls, method=method, seed=0, **{k: v for k, v in tiny.items() if k != 'img_size'}, **kw)

    def fit(learn, n=2, cbs=None):
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n, 1e-3, cbs=cbs)
        return learn

    class Interrupt(Callback):
        order = 90
        def after_batch(self):
            if self.training and self.epoch == 1: raise KeyboardInterrupt
    learner.fit, learner.Interrupt = fit, Interrupt
    return learner


@pytest.fixture
def displayed(monkeypatch):
    "What would be shown in a notebook: the pictures of each display."
    class Handle(list):
        def update(self, picture): self.append(picture)
    shown = []
    def display(picture, display_id):
        assert display_id
        shown.append(Handle([picture])); return shown[-1]
    monkeypatch.setattr(ex, 'display', display)
    return shown


def test_outside_a_notebook_it_only_keeps_numbers(training, displayed):
    learn = training(); cb = ex.watch(learn)
    with pytest.raises(RuntimeError, match='nothing was watched yet'): cb.figure()
    training.fit(learn)
    assert not displayed and len(cb.record.values['pixels (training)']) == 8 and len(cb.record.values['variance']) == 8
    rec = learn.recorder
    ours = [cb.record.means[f'{k} (validation)'][-1] for k in ('pixels', 'features')]
    theirs = [rec.values[-1][rec.metric_names[1:].index(k)] for k in ('pixels', 'features')]
    assert np.allclose(ours, theirs, rtol=1e-4)
    assert np.asarray(cb.figure()).std() > 10


def test_in_a_notebook_it_updates_one_display(training, displayed):
    learn = training(); cb = ex.watch(learn, every=0, show=True)
    training.fit(learn)
    assert len(displayed) == 1 and len(displayed[0]) >= 2
    assert np.array_equal(displayed[0][-1], cb.figure())                # the last picture is the static figure
    training.fit(learn, 1); assert len(displayed) == 2


def test_it_draws_as_often_as_it_was_told(training, displayed):
    ex.watch(learn := training(), every=3600, show=True)
    training.fit(learn); assert len(displayed[0]) == 2                  # the first batch and the end


@pytest.mark.parametrize('show', [True, False])
def test_the_training_is_the_same_with_and_without(training, displayed, show):
    plain = training.fit(training()); learn = training(); ex.watch(learn, every=0, show=show); training.fit(learn)
    assert all(torch.equal(a, b) for a, b in zip(plain.model.state_dict().values(), learn.model.state_dict().values()))
    assert learn.recorder.values == plain.recorder.values


def test_an_interrupt_leaves_a_picture_and_a_learner_that_trains(training, displayed):
    learn = training(); cb = ex.watch(learn, every=0, show=True)
    with pytest.raises(KeyboardInterrupt): training.fit(learn, cbs=training.Interrupt())
    assert displayed[0] and len(cb.record.values['pixels (training)']) >= 4 and cb.figure().height > 100
    learn.remove_cbs(training.Interrupt); training.fit(learn, 1)
    assert len(cb.record.values['pixels (training)']) == 4 and len(displayed) == 2


def test_trouble_with_a_picture_does_not_end_a_training(training, displayed, monkeypatch):
    learn = training(); cb = ex.watch(learn, every=0, show=True)
    monkeypatch.setattr(type(cb), 'figure', lambda self: 1/0)
    with pytest.warns(UserWarning, match='ZeroDivisionError.*The training goes on') as seen: training.fit(learn)
    assert len(learn.recorder.values) == 2 and sum('watch draws' in str(o.message) for o in seen) == 1


@pytest.mark.parametrize('method', ['mae', 'dbot'])
def test_other_methods(training, method):
    learn = training(method); cb = ex.watch(learn, image=sample_photo('coffee'), mask=RandomMask(.5), seed=1)
    training.fit(learn, 1)
    assert ('variance' in cb.record.values) == (method == 'dbot') and cb.figure().width > 400
    assert torch.equal(cb._batch[1], View(learn.model, sample_photo('coffee'), RandomMask(.5), 1).mask)


def test_a_learner_that_is_watched_can_be_exported(training, tmp_path):
    from fastai.learner import load_learner
    learn = training(path=tmp_path); ex.watch(learn); ex.watch(learn)
    assert [o.name for o in learn.cbs].count('watch') == 1
    assert pickle.loads(pickle.dumps(type(learn.watch))) is ex.Watch
    training.fit(learn, 1); learn.export(tmp_path/'learn.pkl')
    assert len(load_learner(tmp_path/'learn.pkl').watch.record.means['pixels (training)']) == 1


def test_finding_a_learning_rate_is_not_watched(training, displayed):
    learn = training(); cb = ex.watch(learn, every=0, show=True)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=6, show_plot=False)
    assert not displayed and not cb.record.values


def test_another_learner_is_refused(training):
    learn = training(); learn.loss_func = torch.nn.MSELoss()
    with pytest.raises(TypeError, match='watch needs a learner of mim_learner'): ex.watch(learn)


def test_a_collapse_is_seen():
    record = ex.Record(.1)
    for i, v in enumerate([.5, .3, .05]): record.add('variance', i, torch.tensor(v))
    assert record.collapsed and 'below 0.1' in record.sentence and 'collapsed' in record.sentence
    red = lambda im: (np.asarray(im).astype(int) @ [1, -1, 0] > 100).sum()
    alarm = red(ex.record_figure(record)); record.add('variance', 3, .4)
    assert not record.collapsed and 'no collapse' in record.sentence and red(ex.record_figure(record)) < alarm


# in JupyterLab

notebook = """
from bootmae_nb.explore import explore
from bootmae_nb.models import mim_model
tiny = dict(arch='vit_tiny_patch16_224', img_size=(64, 96), patch_size=8, width=48, depth=2, heads=3, seed=0)
explorer = explore({'first': mim_model('bootmae', **tiny), 'second': mim_model('mae', **tiny)})
explorer
"""


def until(f, what, wait=60):
    "Wait until `f` says yes."
    start = time.monotonic()
    while not f():
        assert time.monotonic() - start < wait, f'waited {wait} s in vain: {what}'
        time.sleep(.1)


def test_in_jupyterlab(tmp_path):
    find_chromium(); pytest.importorskip('jupyterlab')
    write_notebook(tmp_path/'look.ipynb', notebook)
    with jupyter_lab(tmp_path) as address, browser_page() as page:
        run_all(page, address, 'look.ipynb')
        canvas = page.locator('.patch-canvas canvas'); canvas.wait_for()
        page.get_by_text('72 of 96 patches hidden (75%)', exact=True).wait_for()
        picture = lambda: page.locator('.jupyter-widget-tab img:visible').evaluate("""async im => {
            await im.decode(); const c = document.createElement('canvas'); c.width = im.naturalWidth; c.height = im.naturalHeight;
            c.getContext('2d').drawImage(im, 0, 0); return c.toDataURL() }""")
        def changed(act, what):
            before = picture(); act(); until(lambda: picture() != before, what)
        def centre(row, col):
            box = canvas.bounding_box()
            return box['x'] + (col + .5)*box['width']/12, box['y'] + (row + .5)*box['height']/8
        label = lambda: canvas.get_attribute('aria-label')
        until(lambda: '8 by 12 patches, 72 hidden' in label(), 'the image says what it is')

        # the mouse: all of the first row hidden, then shown, by dragging fast
        slider = page.get_by_role('slider').first
        changed(lambda: (slider.focus(), page.keyboard.press('ArrowLeft')), 'the ratio makes another picture')
        page.get_by_text('68 of 96 patches hidden (71%)', exact=True).wait_for()
        page.get_by_role('button', name='Show all').click()
        page.get_by_text('the mask hides 0 of 96 patches').wait_for()
        page.mouse.move(*centre(0, 0)); page.mouse.down(); page.mouse.move(*centre(0, 11)); page.mouse.up()
        page.get_by_text('12 of 96 patches hidden (12%), drawn by hand').wait_for()
        changed(lambda: page.mouse.click(*centre(3, 4)), 'a click hides a patch')
        page.get_by_text('13 of 96 patches hidden').wait_for()
        changed(lambda: page.mouse.click(*centre(3, 4)), 'a click shows it again')

        # the keyboard, from the patch that was clicked
        page.keyboard.press('ArrowDown'); page.keyboard.press('ArrowRight'); page.keyboard.press('Space')
        page.get_by_text('13 of 96 patches hidden').wait_for(); page.get_by_text('row 5, column 6, hidden').wait_for()
        page.keyboard.press('Enter'); page.get_by_text('Patch in row 5, column 6').wait_for()

        # asking
        changed(lambda: page.mouse.click(*centre(6, 2)), 'another patch asks'); page.get_by_text('Patch in row 7, column 3').wait_for()
        tab = lambda name: page.locator('.jupyter-widget-tab .lm-TabBar-tab', has_text=name).click()
        tab('Compare'); page.get_by_text('Means over the hidden patches. first: error').wait_for()
        changed(lambda: page.mouse.click(*centre(2, 2)), 'and the mouse draws again'); page.get_by_text('14 of 96 patches hidden').wait_for()

        # uploads
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (2000, 2000, 3), np.uint8)).save(tmp_path/'mine.png')      # 12 MB: more than one message may hold
        (tmp_path/'text.png').write_text('no image')
        with page.expect_file_chooser() as chooser: page.get_by_role('button', name='Upload images').click()
        chooser.value.set_files([tmp_path/'mine.png', tmp_path/'text.png'])
        page.get_by_text('text.png holds text, not an image').wait_for()
        until(lambda: page.get_by_label('Image', exact=True).locator('option:checked').inner_text() == 'mine.png', 'the new image is chosen')
        assert not page.foreign and not page.errors


def test_attention_nearest_and_ratio_follow_their_controls(explorer):
    differ = lambda a, b: a.shape != b.shape or (a != b).any()
    go(explorer, 'Attention'); first = shown(explorer)
    explorer.block.value = 0; second = shown(explorer)
    explorer.canvas.clicked = 5; go(explorer, 'Attention')
    assert differ(first, second) and differ(second, shown(explorer))
    go(explorer, 'Nearest patches'); before = shown(explorer)
    assert '0 coffee, 1 chelsea' in explorer.panes['Nearest patches'].numbers.value
    explorer.canvas.clicked = 9; go(explorer, 'Nearest patches')
    assert differ(before, shown(explorer))
    go(explorer, 'Mask ratio'); before = shown(explorer)
    explorer.seed.value = 8
    assert differ(before, shown(explorer))
