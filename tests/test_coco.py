"What is in images: annotations in COCO's format, augmentation, loaders, pictures, average precision"
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from bootmae_nb import coco
from bootmae_nb.coco import (
    AnnotationError, DetectAugment, DetectSet, _runs, _scaled_part, _segmentation_problem, average_precision, coco_dls, coco_results, detect_dls, draw_things,
    find_annotations, ground_truth, make_report, mask_boxes, read_coco, results_for, thing_mask)
from bootmae_nb.data import OpenImage, seeded
from bootmae_nb.images import ImageError
from common import changed, dls_of, images_of_several_sizes


# ---- annotations

def test_all_kinds_of_segmentation_are_one_mask():
    m = np.zeros((7, 9), np.uint8); m[2:5, 3:8] = 1
    rle = coco_mask.encode(np.asfortranarray(m))
    runs = _runs(rle['counts'].decode())
    assert sum(runs) == 63 and runs[0] == 3*7 + 2
    for seg in (dict(size=[7, 9], counts=rle['counts'].decode()), dict(size=[7, 9], counts=runs), [[3, 2, 8, 2, 8, 5, 3, 5]]):
        assert _segmentation_problem(seg, 7, 9) is None and (thing_mask(dict(segmentation=seg), 7, 9) == m).all()


@pytest.mark.parametrize('seed', range(5))
def test_runs_of_any_mask(seed):
    m = np.random.default_rng(seed).random((37, 53)) < (.02, .5, .98, .3, .7)[seed]
    rle = coco_mask.encode(np.asfortranarray(m.astype(np.uint8)))
    flat = m.T.reshape(-1); edges = np.flatnonzero(np.diff(flat.astype(int))) + 1
    want = np.diff([0, *edges, len(flat)]).tolist()
    assert _runs(rle['counts'].decode()) == ([0] if flat[0] else []) + want


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
    with pytest.warns(UserWarning, match='average precision is undefined'): coco_dls(*files, *f, device='cpu', num_workers=0)


def test_annotations_of_images_that_are_not_named(tmp_path, files):
    def change(d): d['annotations'][0]['image_id'] = 999
    with pytest.warns(UserWarning, match='1 annotations are of images that the file does not name, e.g. 999'): coco = read_coco(*changed(tmp_path, files, change))
    assert coco.n_things == read_coco(*files).n_things - 1


def test_classes_that_validation_lacks_or_has_more(tmp_path, files):
    def fewer(d):
        d['categories'] = [dict(id=5, name='digit 1')]
        d['annotations'] = [dict(o, category_id=5) for o in d['annotations'] if o['category_id'] == 2]
    dls = coco_dls(*files, *changed(tmp_path, files, fewer), device='cpu', num_workers=0)
    coco = dls.valid.dataset.coco
    assert coco.names == dls.vocab and coco.ids[1] == 5 and len(set(coco.ids)) == 3
    rows = [dict(image_id=o['id'], category_id=5, bbox=a['bbox'], segmentation=a['segmentation'], score=1.) for o,t in zip(coco.images, coco.things) for a in t]
    report = make_report(coco, rows)
    assert report['box_AP'] == pytest.approx(1) and math.isnan(report['box_per_class']['digit 0'])
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


@pytest.mark.parametrize('chans', [1, 3, 4])
@pytest.mark.parametrize('new,start', [
    ((80, 120), (13, 50)), ((110, 170), (0, 122)), ((33, 50), (-15, 2)), ((20, 25), (-28, -23)), ((48, 48), (0, 0)), ((163, 77), (115, 29))])
def test_a_part_of_a_scaled_image_is_what_scaling_and_cropping_give(chans, new, start):
    g,size = torch.Generator().manual_seed(0), (48, 48)
    x = torch.randint(256, (chans, 50, 75), generator=g).to(torch.uint8)
    m = torch.zeros(12, 50, 75, dtype=torch.uint8)
    for i in range(12):
        y,z = int(torch.randint(40, (), generator=g)), int(torch.randint(65, (), generator=g)); m[i, y:y + 9, z:z + 7] = 1
    boxes = tv_tensors.BoundingBoxes(mask_boxes(m), format='XYXY', canvas_size=(50, 75))
    got,t = _scaled_part(tv_tensors.Image(x), dict(boxes=boxes, labels=torch.arange(12), masks=tv_tensors.Mask(m)), new, start, size)
    room = [max(-a, 0) for a in start], [max(a + s - n, 0) for a,s,n in zip(start, size, new)]
    pad = [room[0][1], room[0][0], room[1][1], room[1][0]]                                  # left, top, right, bottom
    crop = lambda o, fill=0: F.crop(F.pad(o, pad, fill), max(start[0], 0), max(start[1], 0), *size)
    want = crop(F.resize(x, new, antialias=True), 116)
    assert (got.int() - want.int()).abs().max() <= 2 and (got.int() - want.int()).abs().float().mean() < .3
    masks = crop(F.resize(m, new, InterpolationMode.NEAREST_EXACT))
    seen = masks.flatten(1).any(1)
    assert set(torch.arange(12)[seen].tolist()) <= set(t['labels'].tolist()) and len(t['labels']) == len(t['boxes']) == len(t['masks'])
    assert torch.equal(t['masks'], masks[t['labels']]) and (new[0] < 100 or len(t['labels']) < 12)
    scaled = F.resize(boxes, new)
    shifted = scaled.as_subclass(torch.Tensor)[t['labels']] - torch.tensor([start[1], start[0]]*2)
    torch.testing.assert_close(t['boxes'].as_subclass(torch.Tensor), shifted.clamp(0, 48), atol=1e-3, rtol=1e-5)


def test_jitter_is_drawn_as_torchvision_draws_it(monkeypatch):
    "How large an image becomes, and where the window begins, over many draws; torchvision takes (width, height) for the scale"
    x,n,drawn = torch.zeros(1, 30, 45, dtype=torch.uint8), 3000, []
    ours,scale,crop = coco._Jitter((40, 50), (.3, 2.)), v2.ScaleJitter((50, 40), (.3, 2.)), v2.RandomCrop((40, 50), pad_if_needed=True)
    monkeypatch.setattr(coco, '_scaled_part', lambda image, targ, new, start, size: drawn.append([*new, *start]))
    def theirs():
        new = scale.make_params([x])['size']
        where = crop.make_params([x[:, :1, :1].expand(1, *new)])
        left,top = where['padding'][:2]
        return [*new, where['top'] - top, where['left'] - left]
    with seeded(0):
        for _ in range(n): ours(x, {})
    with seeded(1): a,b = (torch.tensor(o).double() for o in (drawn, [theirs() for _ in range(n)]))
    for o in torch.linspace(.02, .98, 9).double(): torch.testing.assert_close(a.quantile(o, 0), b.quantile(o, 0), atol=2.5, rtol=.05)
    torch.testing.assert_close(torch.corrcoef(a.T), torch.corrcoef(b.T), atol=.06, rtol=0)


def test_an_image_of_the_wanted_shape_fits_at_scale_one():
    x = torch.arange(48*64).reshape(1, 48, 64).to(torch.uint8)
    m = (x > 99).to(torch.uint8)
    for k in (1, 2):
        o = x, dict(boxes=mask_boxes(m), labels=torch.zeros(1, dtype=torch.long), masks=m)
        y,t = DetectAugment((48*k, 64*k), scale=(1., 1.), flip=False, colour=0.)(o, split_idx=0)
        assert torch.equal(t['masks'][:, ::k, ::k], m) and y.shape == (1, 48*k, 64*k) and (k > 1 or torch.equal(x, y))


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
    f = images_of_several_sizes(tmp_path)
    dls = coco_dls(*f, *f, bs=4, device='cpu', num_workers=0)
    x,t = dls.valid.one_batch()
    assert x.shape == (4, 3, 48, 64) and t['size'].tolist() == [[30, 50], [48, 20], [33, 33], [16, 64]] and (x[3, :, 16:] == 0).all()


# ---- pictures

def test_things_are_drawn():
    x = Image.new('RGB', (50, 40))
    pic = draw_things(x, torch.tensor([[5., 5., 30., 30.]]), torch.tensor([0]), ['one'], masks=torch.ones(1, 40, 50) > 0, height=80, words=False)
    assert pic.size == (100, 80) and np.asarray(pic)[60, 90].any()


def test_pictures_of_a_batch_stand_in_rows_of_three(scenes):
    dls = dls_of(scenes, bs=6)
    two,five = (dls.train.show_batch(max_n=n, height=100) for n in (2, 5))
    assert two.height < 150 < five.height and two.width < five.width < 550


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
