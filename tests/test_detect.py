"Detection: annotations, loaders, the model, its training, average precision, pictures"
import copy
import json
import math

import numpy as np
import pytest
import timm
import torch
from fastai.callback.training import GradientAccumulation
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bootmae_nb import detect
from bootmae_nb.checkpoints import CheckpointError, load_model, save_model
from bootmae_nb.data import OpenImage, seeded
from bootmae_nb.detect import (
    AnnotationError, DetectAugment, DetectSet, Detector, average_precision, coco_dls, coco_results, detect_dls, detect_image, detect_learner, evaluate_detector,
    _first_images, find_annotations, ground_truth, head_sizes, load_detector, make_detector, make_report, mask_boxes, read_coco, results_for, thing_mask)
from bootmae_nb.images import ImageError
from bootmae_nb.models import mim_model
from bootmae_nb.runs import ResumeError, RunState
from bootmae_nb.scenes import write_scenes
from common import quietly, state, equal

sizes = dict(width=16, convs=1, rpn_convs=1, head_width=32, proposals=30, samples=16)
pixels = dict(img_size=32, patch_size=8, pixel_width=16, pixel_depth=1, pixel_heads=2)


@pytest.fixture(scope='module')
def tiny(): return mim_model('mae', 'vit_tiny_patch16_224', width=24, depth=2, heads=2, **pixels, seed=0)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory): return write_scenes(tmp_path_factory.mktemp('scenes'), 6, 4, size=(48, 64), side=(16, 30))


@pytest.fixture
def files(scenes): return scenes/'train'/'images', scenes/'annotations'/'instances_train.json'


def changed(tmp_path, files, change):
    "The annotations with a change, as another file"
    d = json.loads(files[1].read_text())
    d = change(d) or d
    (tmp_path/'changed.json').write_text(json.dumps(d))
    return files[0], tmp_path/'changed.json'


def dls_of(scenes, **kw): return detect_dls(scenes, **dict(bs=2, device='cpu', num_workers=0) | kw)


# ---- annotations

def test_all_kinds_of_segmentation_are_one_mask():
    m = np.zeros((7, 9), np.uint8); m[2:5, 3:8] = 1
    rle = coco_mask.encode(np.asfortranarray(m))
    runs = detect._runs(rle['counts'].decode())
    assert sum(runs) == 63 and runs[0] == 3*7 + 2
    for seg in (dict(size=[7, 9], counts=rle['counts'].decode()), dict(size=[7, 9], counts=runs), [[3, 2, 8, 2, 8, 5, 3, 5]]):
        assert detect._segmentation_problem(seg, 7, 9) is None and (thing_mask(dict(segmentation=seg), 7, 9) == m).all()


@pytest.mark.parametrize('seed', range(5))
def test_runs_of_any_mask(seed):
    m = np.random.default_rng(seed).random((37, 53)) < (.02, .5, .98, .3, .7)[seed]
    rle = coco_mask.encode(np.asfortranarray(m.astype(np.uint8)))
    flat = m.T.reshape(-1); edges = np.flatnonzero(np.diff(flat.astype(int))) + 1
    want = np.diff([0, *edges, len(flat)]).tolist()
    assert detect._runs(rle['counts'].decode()) == ([0] if flat[0] else []) + want


def test_what_is_read(files):
    coco = read_coco(*files)
    d = json.loads(files[1].read_text())
    assert len(coco) == 6 and coco.n_things == len(d['annotations']) and coco.names == ['digit 0', 'digit 1', 'digit 7'] and not coco.left_out
    assert coco.counts().things.sum() == len(d['annotations']) and '6 images' in repr(coco)
    ds = DetectSet(coco, OpenImage(3))
    x,t = ds[0]
    assert x.dtype == torch.uint8 and x.shape == (3, 48, 64) and t['masks'].shape[1:] == (48, 64)
    torch.testing.assert_close(t['boxes'], mask_boxes(t['masks']))
    a = [o for o in d['annotations'] if o['image_id'] == 1]
    assert t['labels'].tolist() == [o['category_id'] - 1 for o in a]
    assert (np.asarray(Image.open(files[0]/'0000.png')) == x.permute(1, 2, 0).numpy()).all()


def test_ids_with_gaps_and_names_in_any_order(tmp_path, files):
    new = {1: 90, 2: 7, 3: 44}
    def change(d):
        for o in d['categories']: o['id'] = new[o['id']]
        for o in d['annotations']: o['category_id'] = new[o['category_id']]
    coco,old = read_coco(*changed(tmp_path, files, change)), read_coco(*files)
    assert coco.ids == [7, 44, 90] and coco.names == ['digit 1', 'digit 7', 'digit 0']
    a,b = DetectSet(coco, OpenImage(3)), DetectSet(old, OpenImage(3))
    for i in range(len(a)): assert [coco.names[o] for o in a[i][1]['labels']] == [old.names[o] for o in b[i][1]['labels']]


def test_crowds_are_not_learnt_but_pardoned(tmp_path, files):
    def change(d): d['annotations'][0]['iscrowd'] = 1
    coco = read_coco(*changed(tmp_path, files, change))
    whole = read_coco(*files)
    i = next(i for i,o in enumerate(whole.images) if whole.things[i])
    assert coco.n_crowd == 1 and coco.n_things == whole.n_things - 1
    assert len(DetectSet(coco, OpenImage(3)).things(i)['boxes']) == len(DetectSet(whole, OpenImage(3)).things(i)['boxes']) - 1
    truth = ground_truth(coco)
    assert sum(o['iscrowd'] for o in truth.dataset['annotations']) == 1
    a = coco.things[i][0]
    row = lambda o: dict(image_id=o['image_id'], category_id=o['category_id'], bbox=o['bbox'], segmentation=o['segmentation'])
    others = [row(o) | dict(score=.5) for t in coco.things for o in t if not o.get('iscrowd')]
    with_crowd = [*others, row(a) | dict(score=.9)]
    assert make_report(coco, with_crowd)['box_AP'] == pytest.approx(make_report(coco, others)['box_AP']) == pytest.approx(1)
    assert make_report(whole, others)['box_AP'] < .999


def test_images_without_things(tmp_path, files):
    def change(d): d['annotations'] = [o for o in d['annotations'] if o['image_id'] != 2]
    f = changed(tmp_path, files, change)
    kept,dropped = (coco_dls(*f, *files, keep_empty=o, bs=2, device='cpu', num_workers=0) for o in (True, False))
    assert (len(kept.train.dataset), len(dropped.train.dataset), len(dropped.valid.dataset)) == (6, 5, 6)
    t = kept.train.dataset[1][1]
    assert t['boxes'].shape == (0, 4) and t['masks'].shape == (0, 48, 64)
    def empty(d): d['annotations'] = []
    f = changed(tmp_path, files, empty)
    with pytest.raises(AnnotationError, match='nothing to learn'): coco_dls(*f)
    with pytest.warns(UserWarning, match='average precision is undefined'): dls = coco_dls(*files, *f, device='cpu', num_workers=0)
    with pytest.raises(AnnotationError, match='average precision is undefined'): evaluate_detector(_untrained(dls), dls)


def _untrained(dls):
    return make_detector(mim_model('mae', 'vit_tiny_patch16_224', width=24, depth=1, heads=2, **pixels, seed=0), dls.vocab, 'small', masks=dls.masks, **sizes)


def test_annotations_of_images_that_are_not_named(tmp_path, files):
    def change(d): d['annotations'][0]['image_id'] = 999
    with pytest.warns(UserWarning, match='1 annotations are of images that the file does not name, e.g. 999'): coco = read_coco(*changed(tmp_path, files, change))
    assert coco.n_things == read_coco(*files).n_things - 1


def test_classes_that_validation_lacks_or_has_more(tmp_path, files, tiny):
    def fewer(d):
        d['categories'] = [dict(id=5, name='digit 1')]
        d['annotations'] = [dict(o, category_id=5) for o in d['annotations'] if o['category_id'] == 2]
    dls = coco_dls(*files, *changed(tmp_path, files, fewer), device='cpu', num_workers=0)
    coco = dls.valid.dataset.coco
    assert coco.names == dls.vocab and coco.ids[1] == 5 and len(set(coco.ids)) == 3
    rows = [dict(image_id=o['id'], category_id=5, bbox=a['bbox'], segmentation=a['segmentation'], score=1.) for o,t in zip(coco.images, coco.things) for a in t]
    report = make_report(coco, rows)
    assert report['box_AP'] == pytest.approx(1) and math.isnan(report['box_per_class']['digit 0'])
    evaluate_detector(_untrained(dls), dls)
    def more(d): d['categories'].append(dict(id=9, name='a cat')); d['annotations'][0]['category_id'] = 9
    with pytest.raises(AnnotationError, match='does not name \\(a cat\\)'): coco_dls(*files, *changed(tmp_path, files, more))


def _set(path, value):
    def change(d):
        o = d
        for k in path[:-1]: o = o[k]
        if value is KeyError: del o[path[-1]]
        else: o[path[-1]] = value
    return change

first = 'annotations', 0
@pytest.mark.parametrize('change,words', [
    (lambda d: [1], 'holds a list'),
    (lambda d: [dict(image_id=1, score=.3)], 'list of results, not of annotations'),
    (_set(('categories',), KeyError), "no list 'categories'"),
    (_set(('images', 0, 'file_name'), KeyError), "image number 0 has no 'file_name'"),
    (_set(('images', 0, 'id'), 2), 'two image entries with the id 2'),
    (_set((*first, 'bbox'), KeyError), "annotation 1 has no 'bbox'"),
    (_set((*first, 'category_id'), 77), 'annotation 1 has category 77, which is none of the 3'),
    (_set((*first, 'bbox'), [1, 2, 0, 5]), 'has no area'),
    (_set((*first, 'bbox'), [1, 2, 3]), 'is not \\[x, y, width, height\\]'),
    (_set((*first, 'bbox'), [1, 2, float('nan'), 5]), 'is not \\[x, y'),
    (_set((*first, 'bbox'), [64, 2, 5, 5]), 'outside its image of 64 x 48'),
    (_set((*first, 'segmentation'), KeyError), 'no segmentation: give masks=False'),
    (_set((*first, 'segmentation'), []), 'segmentation is empty'),
    (_set((*first, 'segmentation'), [[1, 2, 3, 4]]), 'polygon that is no list'),
    (_set((*first, 'segmentation'), 'abc'), 'is a str'),
    (_set((*first, 'segmentation', 'size'), [64, 48]), 'RLE is for size'),
    (_set((*first, 'segmentation', 'counts'), '0000'), 'its RLE has 0 pixels'),
    (_set((*first, 'segmentation', 'counts'), 'P'), 'ends in the middle'),
    (_set((*first, 'segmentation', 'counts'), [5, -1]), 'no whole numbers'),
    (_set((*first, 'segmentation', 'counts'), 7), 'no counts'),
    (_set(('images', 0, 'width'), -3), 'is said to have -3 x 48'),
    (_set(('images', 0, 'width'), 65), 'RLE is for size|64 x 48 pixels, and .* says 65 x 48'),
    (_set(('images', 0, 'file_name'), 'gone.png'), 'gone.png is not there'),
    (_set(('categories', 1, 'name'), 'digit 0'), "two categories are called 'digit 0'"),
    (_set(('categories',), []), 'names no categories'),
    (_set(('images',), []), 'names no images')])
def test_what_is_wrong_is_named(tmp_path, files, change, words):
    f = changed(tmp_path, files, change)
    with pytest.raises(AnnotationError, match=words) as e: coco_dls(*f, device='cpu', num_workers=0)
    assert 'changed.json' in str(e.value)


def test_what_is_wrong_can_be_left_out(tmp_path, files):
    def change(d):
        d['images'][0]['file_name'] = 'gone.png'
        i = next(i for i,o in enumerate(d['annotations']) if o['image_id'] != 1)
        d['annotations'][i]['bbox'][2] = 0
        change.lost = 1 + sum(o['image_id'] == 1 for o in d['annotations'])
    f = changed(tmp_path, files, change)
    with pytest.warns(UserWarning, match='2 things are left out'): dls = coco_dls(*f, *files, on_bad='skip', device='cpu', num_workers=0)
    coco = dls.train.dataset.coco
    assert len(coco) == 5 and coco.n_things == read_coco(*files).n_things - change.lost and len(coco.left_out) == 2


def test_wrong_places(tmp_path, files, scenes):
    with pytest.raises(AnnotationError, match='is not there: give the folder of the images'): read_coco(tmp_path/'none', files[1])
    with pytest.raises(AnnotationError, match='is not there: give the JSON'): read_coco(files[0], tmp_path/'none.json')
    with pytest.raises(AnnotationError, match='is a folder: give the JSON'): read_coco(files[0], tmp_path)
    with pytest.raises(AnnotationError, match='holds none of the 6 images'): read_coco(tmp_path, files[1])
    (tmp_path/'broken.json').write_text(files[1].read_text()[:100])
    with pytest.raises(AnnotationError, match='cannot be read as JSON'): read_coco(files[0], tmp_path/'broken.json')
    with pytest.raises(AnnotationError, match='has neither annotations'): detect_dls(files[0])
    with pytest.raises(AnnotationError, match="no annotations for 'dev', only for train, valid"): detect_dls(scenes, valid='dev')


def test_images_that_are_not_as_annotated(tmp_path, files):
    folder = tmp_path/'images'; folder.mkdir()
    for o in files[0].iterdir(): (folder/o.name).write_bytes(o.read_bytes())
    im = Image.open(folder/'0001.png')
    im.resize((32, 24)).save(folder/'0001.png')
    (folder/'0002.png').write_bytes(b'no image')
    with pytest.raises(AnnotationError, match='0001.png has 32 x 24 pixels, and .* says 64 x 48.*1 more images') as e: coco_dls(folder, files[1], num_workers=0)
    assert 'skip' in str(e.value)
    with pytest.warns(UserWarning, match='2 of . images'): dls = coco_dls(folder, files[1], folder, files[1], on_bad='skip', device='cpu', num_workers=0)
    assert len(dls.train.dataset) == len(dls.valid.dataset) == 4
    for cache in (0, 2**29):                    # a picture that lies on its side, annotated upright
        im.transpose(Image.Transpose.ROTATE_90).save(folder/'0001.png', exif=_turned()); im.save(folder/'0002.png')
        dls = coco_dls(folder, files[1], folder, files[1], device='cpu', num_workers=0, cache=cache)
        assert (dls.valid.dataset[1][0] == torch.from_numpy(np.array(im)).permute(2, 0, 1)).all()
    (folder/'0003.png').write_bytes((folder/'0001.png').read_bytes()); im.resize((32, 24)).save(folder/'0003.png')
    dls = coco_dls(files[0], files[1], device='cpu', num_workers=0, cache=0)
    dls.valid.dataset.items = [folder/'0003.png']*2
    with pytest.raises(ImageError, match='it was changed'): dls.valid.one_batch()


def _turned():
    exif = Image.Exif(); exif[0x0112] = 6                                  # to be turned clockwise by 90 degrees
    return exif


def test_layouts(tmp_path, scenes):
    assert {k: v[0].name for k,v in find_annotations(scenes).items()} == dict(train='images', valid='images')
    for layout in (dict(train='train2017', val='val2017'), dict(train='train', val='val')):
        root = tmp_path/layout['val']; (root/'annotations').mkdir(parents=True)
        for old,new in ('train', layout['train']), ('valid', layout['val']):
            (root/new).symlink_to(scenes/old/'images')
            (root/'annotations'/f'instances_{new}.json').write_bytes((scenes/'annotations'/f'instances_{old}.json').read_bytes())
        dls = dls_of(root)
        assert (len(dls.train.dataset), len(dls.valid.dataset)) == (6, 4) and dls.vocab == ['digit 0', 'digit 1', 'digit 7']
    flat = tmp_path/'flat'
    for part in ('train', 'valid'):
        (flat/part).mkdir(parents=True)
        for o in (scenes/part/'images').iterdir(): (flat/part/o.name).write_bytes(o.read_bytes())
        (flat/part/'_annotations.coco.json').write_bytes((scenes/'annotations'/f'instances_{part}.json').read_bytes())
    assert len(dls_of(flat).valid.dataset) == 4


def test_a_share_for_validation(files):
    a,b,c = (coco_dls(*files, valid_pct=.34, seed=s, device='cpu', num_workers=0) for s in (1, 1, 3))
    names = lambda d: [o['id'] for o in d.valid.dataset.coco.images]
    assert len(names(a)) == 2 and names(a) == names(b) != names(c)
    assert not set(names(a)) & {o['id'] for o in a.train.dataset.coco.images}
    with pytest.raises(ValueError, match='no share of 0'): coco_dls(*files, valid_pct=0)


# ---- augmentation and loaders

@pytest.mark.parametrize('crop,scale', [('jitter', (.1, 2.)), ('jitter', (1.5, 3.)), ('resized', (.2, 1.))])
def test_boxes_and_masks_follow(crop, scale):
    m = torch.zeros(2, 40, 60, dtype=torch.uint8); m[0, 5:20, 10:30] = 1; m[1, 25:35, 40:55] = 1
    x = (m.sum(0)*200).expand(3, -1, -1).to(torch.uint8)
    t = dict(boxes=mask_boxes(m), labels=torch.tensor([0, 1]), masks=m)
    for seed in range(12):
        with seeded(seed): y,u = DetectAugment((48, 48), crop, scale, colour=0., vflip=True)((x, t), split_idx=0)
        assert y.shape == (3, 48, 48) and u['masks'].shape[1:] == (48, 48) and len(u['boxes']) == len(u['labels']) == len(u['masks'])
        assert type(y) is type(u['boxes']) is torch.Tensor
        torch.testing.assert_close(u['boxes'], mask_boxes(u['masks']))
        assert ((u['boxes'][:, 2:] - u['boxes'][:, :2]) >= 2).all()
        whole = u['masks'].sum(0) > 0
        if len(u['labels']) == 2: assert ((y[0] > 150) == whole).float().mean() > .93
    boxes = {k: v for k,v in t.items() if k != 'masks'}
    with seeded(0): y,u = DetectAugment((48, 48), crop, scale, colour=0.)((x, boxes), split_idx=0)
    assert 'masks' not in u and (u['boxes'] <= 48).all()


def test_what_is_cut_away_is_gone():
    m = torch.zeros(1, 64, 64, dtype=torch.uint8); m[0, :6, :6] = 1
    t = dict(boxes=mask_boxes(m), labels=torch.tensor([0]), masks=m)
    n = []
    for seed in range(20):
        with seeded(seed): n.append(len(DetectAugment((16, 16), 'jitter', (4., 4.))((torch.zeros(3, 64, 64, dtype=torch.uint8), t), split_idx=0)[1]['boxes']))
    assert 0 in n and max(n) <= 1


def test_arguments_of_the_augmentation():
    for kw,words in ((dict(crop='wild'), 'crop='), (dict(scale=(2, 1)), 'no range'), (dict(crop='resized', scale=(.5, 2)), 'shares of the area')):
        with pytest.raises(ValueError, match=words): DetectAugment((8, 8), **kw)
    assert 'size=(8, 8)' in repr(DetectAugment((8, 8)))


@pytest.mark.parametrize('chans', [1, 3, 4])
def test_batches(scenes, chans):
    dls = dls_of(scenes, in_chans=chans, img_size=(40, 56))
    x,t = dls.train.one_batch()
    assert x.shape == (2, chans, 40, 56) and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
    assert t['size'].tolist() == [[40, 56]]*2 and all(len(o) == 2 for o in (t['boxes'], t['labels'], t['masks'], t['index']))


def test_the_same_in_every_run_and_with_workers(scenes):
    a,b,c = (dls_of(scenes, img_size=(32, 48), num_workers=n, seed=s).train for n,s in ((0, 3), (2, 3), (0, 4)))
    one,two,three = ([(x, t['index'], t['boxes']) for _ in range(2) for x,t in dl] for dl in (a, b, c))
    assert all(torch.equal(p[0], q[0]) and torch.equal(p[1], q[1]) for p,q in zip(one, two))
    assert not torch.equal(one[0][0], one[3][0]) and not torch.equal(one[0][0], three[0][0])


def test_images_of_several_sizes_in_a_batch(tmp_path):
    folder = tmp_path/'mixed'; folder.mkdir()
    d = dict(images=[], annotations=[], categories=[dict(id=1, name='thing')])
    for i,(h,w) in enumerate(((30, 50), (48, 20), (33, 33), (16, 64))):
        Image.fromarray(np.full((h, w, 3), 50*i, np.uint8)).save(folder/f'{i}.png')
        d['images'].append(dict(id=i, file_name=f'{i}.png', height=h, width=w))
        d['annotations'].append(dict(id=i + 1, image_id=i, category_id=1, bbox=[2, 3, 9, 10], segmentation=[[2, 3, 11, 3, 11, 13, 2, 13]]))
    (tmp_path/'mixed.json').write_text(json.dumps(d))
    dls = coco_dls(folder, tmp_path/'mixed.json', folder, tmp_path/'mixed.json', bs=4, device='cpu', num_workers=0)
    x,t = dls.valid.one_batch()
    assert x.shape == (4, 3, 48, 64) and t['size'].tolist() == [[30, 50], [48, 20], [33, 33], [16, 64]] and (x[3, :, 16:] == 0).all()
    learn = detect_learner(dls, mim_model('mae', 'vit_tiny_patch16_224', width=24, depth=1, heads=2, **pixels, seed=0), 'small', **sizes)
    quietly(learn, 'fit', 1)
    assert math.isfinite(learn.recorder.values[-1][0]) and learn.model.task['min_size'] == 25


# ---- the model

def test_statistics_are_taken_once(tiny):
    model = make_detector(tiny, ['a'], 'small', min_size=32, max_size=48, **sizes).eval()
    x,seen = torch.rand(3, 32, 48), []
    model.maps,own = (lambda o: seen.append(o) or own(o)), model.maps
    with torch.no_grad(): model([x])
    mean,std = (torch.tensor(o)[:, None, None] for o in (tiny.method.mean, tiny.method.std))
    torch.testing.assert_close(seen[0][0], (x - mean)/std, atol=1e-5, rtol=1e-4)


def test_sizes_of_images(tiny):
    model = make_detector(tiny, ['a'], 'small', min_size=40, max_size=60, **sizes).eval()
    t = model.heads.transform
    assert [t([torch.rand(3, *o)])[0].image_sizes[0] for o in ((80, 100), (20, 60), (40, 40))] == [(40, 50), (20, 60), (40, 40)]
    assert t([torch.rand(3, 80, 100)])[0].tensors.shape[-2:] == (48, 64)                # whole multiples of two patches
    t.sized = True
    assert model.train().heads.transform([torch.rand(3, 80, 100)])[0].image_sizes == [(80, 100)]


def test_neighbours_in_a_batch_change_nothing(tiny):
    model = make_detector(tiny, ['a', 'b'], 'small', min_size=40, max_size=64, **sizes).eval()
    a,b,c = torch.rand(3, 40, 56), torch.rand(3, 50, 30), torch.rand(3, 40, 56)
    with torch.no_grad(): together,alone = model([a, b, c]), [model([o])[0] for o in (a, b, c)]
    for p,q in zip(together, alone):
        torch.testing.assert_close(p['boxes'], q['boxes'], atol=1e-3, rtol=1e-4)
        assert p['labels'].tolist() == q['labels'].tolist() and p['masks'].shape == q['masks'].shape and set(p['labels'].tolist()) <= {0, 1}


@pytest.mark.parametrize('patch', [8, 14, 16])
def test_strides_and_anchors(patch):
    enc = mim_model('mae', 'vit_tiny_patch16_224', img_size=2*patch, patch_size=patch, width=24, depth=1, heads=2, pixel_width=16, pixel_depth=1, pixel_heads=2, seed=0)
    model = make_detector(enc, ['a'], 'small', min_size=8*patch, **sizes).eval()
    images,maps,_ = model._prepared([torch.rand(3, 12*patch, 8*patch)], None)
    shapes = [o.shape[-2:] for o in maps.values()]
    n = images.tensors.shape[-2]/patch
    assert [s[0] for s in shapes[:4]] == [4*n, 2*n, n, n/2] and images.tensors.shape[-2] % (2*patch) == 0
    anchors = model.heads.rpn.anchor_generator(images, list(maps.values()))[0]
    at,first = 0, []
    for s in shapes: first.append(anchors[at:at + 6]); at += 3*s[0]*s[1]
    for a,stride in zip(first, [patch/4, patch/2, patch, 2*patch, 4*patch]):
        centre = (a[:, :2] + a[:, 2:])/2
        torch.testing.assert_close(centre[3:] - centre[:3], torch.tensor([[stride, 0.]]).expand(3, -1))
        assert abs((a[1, 2] - a[1, 0]).item() - 8*stride) <= 1
    assert at == len(anchors)
    pool = model.heads.roi_heads.box_roi_pool
    side = lambda s: pool.map_levels([torch.tensor([[0., 0., s, s]])]).item()
    assert [side(14*patch*k) for k in (.1, .5, 1., 2., 9.)] == [0, 1, 2, 3, 3]
    assert pool.scales == [4/patch, 2/patch, 1/patch, .5/patch]


def test_regions_are_taken_from_their_places():
    "What is pooled from a map of coordinates tells where the box is, also in a small image that was padded; torchvision counts from the first pixel's middle"
    pool = detect._pool([2., 4., 8., 16.], 8, 7)
    maps = {str(i): torch.stack(torch.meshgrid(*[torch.arange(64//s)*1.*s]*2, indexing='ij'))[None] for i,s in enumerate((2, 4, 8, 16))}
    boxes = torch.tensor([[10., 14., 18., 30.]])
    y,x = pool(maps, [boxes], [(20, 33)])[0].mean((1, 2)).tolist()
    assert abs(y - 22) < .6 and abs(x - 14) < .6


def test_sources(tiny, tmp_path):
    vit = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    file = save_model(tiny, tmp_path/'tiny')
    for source in (vit, file, 'packaged', tiny, copy.deepcopy(tiny)):
        model = make_detector(source, ['a'], 'small', **sizes)
        assert isinstance(model, Detector) and not model.decoders
    torch.testing.assert_close(make_detector(vit, ['a'], 'small', **sizes).encoder.vit.blocks[1].attn.qkv.weight, vit.blocks[1].attn.qkv.weight)
    again = make_detector(model, ['x', 'y'], 'small', **sizes)                            # another task from a detector
    assert torch.equal(again.encoder.vit.pos_embed, model.encoder.vit.pos_embed) and again.vocab == ['x', 'y']


@pytest.mark.parametrize('kw', [dict(masks=False), dict(window=2), dict(scales=(2, 1)), dict(convs=0), dict(in_chans=1), dict(in_chans=5)])
def test_kinds_of_detectors(tiny, kw, tmp_path):
    model = make_detector(tiny, ['a', 'b'], 'small', **sizes | kw).eval()
    x = torch.rand(model.in_chans, 40, 70)
    with torch.no_grad(): found = model([x])[0]
    assert ('masks' in found) == kw.get('masks', True)
    file = save_model(model, tmp_path/'d')
    again = load_detector(file)
    assert again.task == model.task
    with torch.no_grad(): torch.testing.assert_close(again([x])[0]['boxes'], found['boxes'])
    targ = dict(size=torch.tensor([[40, 70]]), index=torch.tensor([0]), boxes=[torch.tensor([[3., 4., 30., 31.]])], labels=[torch.tensor([1])],
                masks=[torch.ones(1, 40, 70, dtype=torch.uint8)])
    losses = model.train()([x], targ)
    assert len(losses) == 4 + kw.get('masks', True) and all(o.isfinite() for o in losses.values())
    sum(losses.values()).backward()
    assert model.encoder.vit.blocks[0].attn.qkv.weight.grad.abs().sum() > 0 and model.encoder.vit.pos_embed.grad[:, 1:].abs().sum() > 0
    if 'window' in kw:
        plain = make_detector(tiny, ['a', 'b'], 'small', **sizes, seed=0).eval()
        with torch.no_grad(): assert not torch.allclose(plain.maps(x[None])['1'], model.eval().maps(x[None])['1'])


def test_what_is_not_possible(tiny, tmp_path):
    for kw,words in ((dict(vocab=[]), 'none'), (dict(vocab=['a', 'a']), 'named twice'), (dict(heads='huge'), 'heads='), (dict(scales=(1, 2)), 'no pyramid'),
                     (dict(scales=(3,)), 'no pyramid'), (dict(min_size=0), 'min_size')):
        with pytest.raises(ValueError, match=words): make_detector(tiny, **dict(vocab=['a']) | kw)
    with pytest.raises(TypeError, match='depth is no size of the heads'): make_detector(tiny, ['a'], depth=3)
    model = make_detector(tiny, ['a'], 'small', **sizes)
    with pytest.raises(ValueError, match='needs to be told'): model.train()([torch.rand(3, 32, 32)])
    with pytest.raises(ValueError, match='does not fit this model'): model.eval()([torch.rand(1, 32, 32)])
    with pytest.raises(CheckpointError, match='load it with load_detector'): load_model(save_model(model, tmp_path/'d'))
    with pytest.raises(CheckpointError, match='without heads'): load_detector(save_model(tiny, tmp_path/'e'))
    assert set(head_sizes['paper']) == set(head_sizes['small'])


def test_bf16_leaves_boxes_exact(tiny):
    model = make_detector(tiny, ['a'], 'small', min_size=32, max_size=600, **sizes).eval()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): found = model([torch.rand(3, 32, 600)])[0]
    assert found['boxes'].dtype == found['scores'].dtype == torch.float32
    assert (found['boxes'][:, 2] > 256).any() and ((found['boxes']*4 % 1) != 0).any()


# ---- average precision

def _noisy(coco, seed=0):
    "Findings near the truth, some of the wrong class, some of nothing"
    g,rows = np.random.default_rng(seed), []
    for o,things in zip(coco.images, coco.things):
        for a in things:
            x,y,w,h = (np.array(a['bbox']) + g.normal(0, 2.5, 4)).tolist()
            m = np.roll(thing_mask(a, o['height'], o['width']), int(g.integers(-2, 3)), 1)
            rle = coco_mask.encode(np.asfortranarray(m))
            c = a['category_id'] if g.random() < .8 else int(g.choice(coco.ids))
            rows.append(dict(image_id=o['id'], category_id=c, bbox=[x, y, max(w, 1), max(h, 1)], score=float(g.random()),
                             segmentation=dict(size=rle['size'], counts=rle['counts'].decode())))
    return rows


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_average_precision_is_that_of_pycocotools(tmp_path, files, kind):
    def change(d):
        for i in (0, 5): d['annotations'][i]['iscrowd'] = 1
        for o in d['categories']: o['id'] *= 11
        for o in d['annotations']: o['category_id'] *= 11
    folder,file = changed(tmp_path, files, change)
    coco = read_coco(folder, file)
    rows = _noisy(coco)
    (tmp_path/'results.json').write_text(json.dumps(results_for(rows, kind)))
    gt = COCO(str(file))                                                                # the original file, by its own reader
    ev = COCOeval(gt, gt.loadRes(str(tmp_path/'results.json')), kind); ev.evaluate(); ev.accumulate(); ev.summarize()
    got = make_report(coco, rows).kinds[dict(bbox='box', segm='mask')[kind]]
    want = dict(zip(('AP', 'AP50', 'AP75', 'AP_small', 'AP_medium', 'AP_large'), ev.stats[:6])) | dict(zip(('AR', 'AR_small', 'AR_medium', 'AR_large'), ev.stats[8:]))
    assert 0 < got['AP'] < 1
    for k,v in want.items(): assert got[k] == pytest.approx(v, abs=1e-12) if v > -1 else math.isnan(got[k]), k


def test_a_model_is_measured_as_by_hand(scenes, tiny, tmp_path):
    dls = dls_of(scenes)
    model = make_detector(tiny, dls.vocab, 'small', min_size=48, lowest_score=0., **sizes)
    report = evaluate_detector(model, dls)
    assert len(report.rows) > 20
    (tmp_path/'results.json').write_text(json.dumps(results_for(report.rows, 'bbox')))
    gt = COCO(str(scenes/'annotations'/'instances_valid.json'))
    ev = COCOeval(gt, gt.loadRes(str(tmp_path/'results.json')), 'bbox'); ev.evaluate(); ev.accumulate(); ev.summarize()
    assert report['box_AP'] == pytest.approx(ev.stats[0], abs=1e-9) and report['box_AR'] == pytest.approx(ev.stats[8], abs=1e-9)
    assert 'mask' in str(report) and json.dumps(report.to_dict()) and list(report.per_class.index) == dls.vocab


def test_nothing_found_and_nothing_to_be_found(files):
    coco = read_coco(*files)
    report = make_report(coco, [])
    assert report['box_AP'] == report['mask_AP50'] == report['box_AR'] == 0 and report.to_dict()['box']['AP_large'] is None
    rows = _noisy(coco)
    many = [dict(o, score=.9) for o in rows for _ in range(40)] + rows
    assert average_precision(ground_truth(coco), many, 'bbox', 10)['AR'] < average_precision(ground_truth(coco), many, 'bbox', 400)['AR']
    found = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), scores=torch.zeros(0), masks=torch.zeros(0, 1, 48, 64))
    assert coco_results(found, 1, [1]) == []


def test_sizes_of_things_without_an_area(tmp_path, files):
    def change(d):
        for o in d['annotations']: del o['area']
    a,b = ground_truth(read_coco(*changed(tmp_path, files, change))), ground_truth(read_coco(*files))
    assert [o['area'] for o in a.dataset['annotations']] == [o['area'] for o in b.dataset['annotations']]


# ---- training

def learner(scenes, tiny, **kw):
    dls_kw = {k: kw.pop(k) for k in ('masks', 'in_chans', 'img_size', 'bs') if k in kw}
    return detect_learner(dls_of(scenes, **dict(img_size=(32, 48)) | dls_kw), tiny, 'small', **sizes | dict(lr=1e-3, seed=1) | kw)


@pytest.mark.parametrize('kw', [dict(), dict(masks=False), dict(precision='bf16'), dict(in_chans=1), dict(window=2), dict(activations='lean'),
                                dict(activations='checkpoint')])
def test_kinds_of_training(scenes, tiny, kw):
    learn = learner(scenes, tiny, **kw)
    before = state(learn.model)
    quietly(learn, 'fit_one_cycle', 1)
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    parts = [o for o in row if o.endswith('_loss') and o not in ('train_loss', 'valid_loss')]
    assert len(parts) == (4 if kw.get('masks') is False else 5) and ('mask_AP' in row) == (kw.get('masks') is not False)
    assert all(math.isfinite(o) for k,o in row.items() if k != 'time')
    assert row['valid_loss'] == pytest.approx(sum(row[o] for o in parts), rel=1e-4)
    after = state(learn.model)
    unused = ('standard.', 'encoder.vit.norm.', 'heads.backbone.levels.3.', *(['encoder.vit.cls_token'] if 'window' in kw else []))  # nothing large is in these scenes
    assert [k for k in before if torch.equal(before[k], after[k]) and not k.startswith(unused)] == []
    assert learn.detect_batch.report()['box_AP'] == row['box_AP'] == pytest.approx(learn.evaluate()['box_AP'], abs=.02 if 'precision' in kw else 1e-9)


def test_validation_losses_are_the_same_each_time(scenes, tiny):
    learn = learner(scenes, tiny)
    with learn.no_bar(): a = learn.validate(); torch.rand(3); b = learn.validate()
    assert list(a) == list(b)


def test_gradient_accumulation(scenes, tiny):
    learn = learner(scenes, tiny, bs=1)
    steps = []
    class Count(detect.LabelBatch):
        order = 99
        def after_step(self): steps.append(self.train_iter)
    quietly(learn, 'fit', 1, cbs=[GradientAccumulation(3), Count()])
    assert len(learn.dls.train) == 6 and len(steps) == 2


def test_layers_learn_at_their_own_rates(scenes, tiny):
    learn = learner(scenes, tiny, layer_decay=.5, wd=.1)
    learn.create_opt()
    groups = learn.opt.param_lists
    assert len(groups) == 2*(2 + 2) and sum(map(len, groups)) == len(list(learn.model.parameters()))
    heads = {id(p) for p in learn.model.heads.parameters()}
    assert heads <= {id(p) for g in list(groups)[-2:] for p in g} and learn.opt.factors[-1] == 1. and learn.opt.factors[0] == .125


@pytest.mark.parametrize('stop', [1, 4])
def test_a_run_that_was_stopped_ends_with_the_same_weights(scenes, tiny, tmp_path, stop):
    def run(folder, at=None):
        learn,cb = learner(scenes, tiny, drop_path=.3, bs=2), RunState(folder, best='mask_AP')
        if at: cb.before_batch = lambda: cb.stop() if cb.training and cb.train_iter == at else None
        try: quietly(learn, *(('resume', folder) if (folder/'state').exists() else ('fit_one_cycle', 2)), **({} if (folder/'state').exists() else dict(cbs=cb)))
        except KeyboardInterrupt: return None
        return learn
    whole = run(tmp_path/'whole')
    assert run(tmp_path/'halves', stop) is None
    halves = run(tmp_path/'halves')
    assert equal(state(whole.model), state(halves.model)) and whole.recorder.values[-1][:-1] == halves.recorder.values[-1][:-1]
    best = load_detector(tmp_path/'whole'/'best.safetensors')
    assert best.vocab == whole.model.vocab
    other = learner(scenes, tiny, drop_path=.3, bs=2, img_size=(40, 48))
    assert run(tmp_path/'third', 1) is None
    with pytest.raises(ResumeError, match='augmentation'): quietly(other, 'resume', tmp_path/'third')


def test_save_and_load_of_a_learner(scenes, tiny, tmp_path):
    learn = learner(scenes, tiny, path=tmp_path)
    quietly(learn, 'fit_paper', 1)
    learn.save('m')
    other = learner(scenes, tiny, path=tmp_path, seed=2)
    assert not equal(state(learn.model), state(other.model))
    other.load('m')
    assert equal(state(learn.model), state(other.model))
    file = save_model(learn.model, tmp_path/'d')
    more = detect_learner(learn.dls, load_detector(file))
    quietly(more, 'fit', 1)
    with pytest.raises(ValueError, match='same classes'): evaluate_detector(make_detector(tiny, ['a'], 'small', **sizes), learn.dls)


def test_what_a_learner_refuses(scenes, tiny):
    dls = dls_of(scenes)
    for kw,words in ((dict(layer_decay=2), 'layer_decay'), (dict(precision='int8'), 'precision')):
        with pytest.raises(ValueError, match=words): detect_learner(dls, tiny, 'small', **kw)
    model = make_detector(tiny, dls.vocab, 'small', masks=False, **sizes)
    with pytest.raises(ValueError, match='masks=False'): detect_learner(dls, model)
    with pytest.raises(TypeError, match='width cannot be changed'): detect_learner(dls, model, width=3)
    from bootmae_nb.labelled import labelled_dls
    with pytest.raises(TypeError, match='coco_dls or detect_dls'): detect_learner(labelled_dls('digits', 8, device='cpu', num_workers=0), tiny)


def test_four_images_learnt_by_heart(tmp_path):
    scenes = write_scenes(tmp_path, 4, 1, size=(64, 64), digits=(0, 1), n=(1, 3), side=(22, 34))
    f = scenes/'train'/'images', scenes/'annotations'/'instances_train.json'
    def often(d):
        d['images'] = [dict(o, id=o['id'] + 100*k) for k in range(14) for o in d['images']]
        d['annotations'] = [dict(a, id=a['id'] + 1000*k, image_id=a['image_id'] + 100*k) for k in range(14) for a in d['annotations']]
    dls = coco_dls(*changed(tmp_path, f, often), *f, bs=4, flip=False, colour=0., device='cpu', num_workers=0)
    blank = mim_model('mae', 'vit_tiny_patch16_224', img_size=64, patch_size=8, width=96, depth=2, heads=3, pixel_width=16, pixel_depth=1, pixel_heads=2, seed=0)
    learn = detect_learner(dls, blank, 'small', lr=3e-3, drop_path=0., layer_decay=1., scales=(2, 1, .5), width=64, convs=0, head_width=128, proposals=60, samples=48)
    quietly(learn, 'fit_one_cycle', 6)
    report = learn.evaluate()
    assert report['box_AP50'] > .95 and report['mask_AP50'] > .9, str(report)
    item = dls.valid.dataset[1]
    found = detect_image(learn.model, item[0].float()/255)
    best = {round(v) for v in found.boxes[0].tolist()}
    assert any((found.boxes[0] - b).abs().max() < 4 for b in item[1]['boxes']) and best
    big = detect_image(learn.model, Image.open(f[0]/'0001.png').resize((128, 128)))
    assert any((big.boxes[0]/2 - b).abs().max() < 4 for b in item[1]['boxes'])


# ---- what is found

def test_anything_is_an_image(tiny, files):
    model = make_detector(tiny, ['a', 'b'], 'small', min_size=48, lowest_score=0., **sizes)
    path = files[0]/'0000.png'
    im = Image.open(path)
    x = torch.from_numpy(np.array(im)).permute(2, 0, 1)/255
    found = [detect_image(model, o, 0.) for o in (path, str(path), im, np.array(im), x)]
    for o in found[1:]: torch.testing.assert_close(o.boxes, found[0].boxes)
    o = found[0]
    assert o.masks.dtype == torch.bool and o.masks.shape[1:] == (48, 64) and set(o.labels) <= {'a', 'b'} and (o.scores.diff() <= 0).all()
    assert o.picture().height == 192 and o.picture(100, words=True).size == (133, 100) and f'{len(o)} things' in repr(o)
    assert len(detect_image(model, path, 1.)) == 0 and detect_image(model, path, 1.).picture().size == (256, 192)
    with pytest.raises(ValueError, match='outside'): detect_image(model, path, 2)
    with pytest.raises(ImageError, match='does not exist'): detect_image(model, 'none.png')


def test_pictures(scenes, tiny):
    learn = learner(scenes, tiny, masks=False)
    for pic in (learn.show_batch(max_n=2), learn.dls.valid.show_batch(max_n=2, height=100), learn.show_results(threshold=0., max_n=2)): assert pic.width > 200
    assert np.asarray(learn.show_results(threshold=1.)).std() > 10
    assert learn.predict(scenes/'valid'/'images'/'0000.png').masks is None
    x = Image.new('RGB', (50, 40))
    pic = detect.draw_things(x, torch.tensor([[5., 5., 30., 30.]]), torch.tensor([0]), ['one'], masks=torch.ones(1, 40, 50) > 0, height=80, words=False)
    assert pic.size == (100, 80) and np.asarray(pic)[60, 90].any()


# ---- on a GPU

@pytest.mark.cuda
@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
def test_training_on_a_gpu(scenes, tiny, precision, tmp_path):
    dls = detect_dls(scenes, img_size=(48, 64), bs=3, device='cuda', num_workers=0)
    learn = detect_learner(dls, tiny, 'small', lr=1e-3, precision=precision, **sizes)
    before = state(learn.model)
    quietly(learn, 'fit_one_cycle', 2, cbs=RunState(tmp_path/'run'))
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert all(math.isfinite(o) for k,o in row.items() if k != 'time') and not learn.finite_guard.skips
    assert not torch.equal(before['encoder.vit.blocks.0.attn.qkv.weight'].cuda(), learn.model.encoder.vit.blocks[0].attn.qkv.weight)
    assert learn.evaluate()['box_AP'] == pytest.approx(row['box_AP'], abs=.05)
    found = detect_image(learn.model, scenes/'valid'/'images'/'0000.png', 0.)
    assert found.boxes.device.type == 'cpu'


@pytest.mark.cuda
def test_a_gpu_finds_what_a_cpu_finds(tiny):
    model = make_detector(tiny, ['a'], 'small', min_size=48, lowest_score=0., **sizes).eval()
    x = torch.rand(3, 48, 64)
    with torch.no_grad(): a = model([x])[0]; b = model.cuda()([x.cuda()])[0]
    torch.testing.assert_close(a['scores'][:5], b['scores'][:5].cpu(), atol=1e-3, rtol=1e-3)


def test_the_map_is_standardised_by_the_first_images_whatever_the_batch(files, tiny):
    first = [_first_images(coco_dls(*files, img_size=(48, 64), bs=bs, num_workers=0, device='cpu').train, 4) for bs in (1, 2, 4)]
    assert all(len(o) == 4 and torch.equal(a, b) for o in first for a,b in zip(o, first[0]))
    std = detect_learner(coco_dls(*files, img_size=(48, 64), bs=2, num_workers=0, device='cpu'), tiny, 'small').model.standard.std
    assert not torch.equal(std, torch.ones_like(std))
    dls = coco_dls(*files, img_size=(48, 64), bs=2, num_workers=0, device='cpu')
    detect_learner(dls, tiny, 'small')
    assert dls.train.epoch == -1                                                # looking at images is no epoch
