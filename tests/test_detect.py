"Detection: the model, how it is measured, its training, what it finds"
import copy
import json
import math

import numpy as np
import pytest
import timm
import torch
from fastai.callback.training import GradientAccumulation
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bootmae_nb import detect
from bootmae_nb.checkpoints import CheckpointError, load_model, save_model
from bootmae_nb.coco import AnnotationError, coco_dls, detect_dls, results_for
from bootmae_nb.detect import Detector, _unpadded_images, detect_image, detect_learner, evaluate_detector, head_sizes, load_detector, make_detector
from bootmae_nb.images import ImageError
from bootmae_nb.models import mim_model
from bootmae_nb.runs import ResumeError, RunState
from bootmae_nb.scenes import write_scenes
from common import changed, dls_of, equal, images_of_several_sizes, quietly, state

sizes = dict(width=16, convs=1, rpn_convs=1, head_width=32, proposals=30, samples=16)
pixels = dict(img_size=32, patch_size=8, pixel_width=16, pixel_depth=1, pixel_heads=2)


@pytest.fixture(scope='module')
def tiny(): return mim_model('mae', 'vit_tiny_patch16_224', width=24, depth=2, heads=2, **pixels, seed=0)


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


def test_narrow_encoders_get_small_heads(tiny):
    wide = mim_model('mae', 'vit_tiny_patch16_224', width=384, depth=1, heads=6, **pixels, seed=0)
    for model,name in ((tiny, 'small'), (wide, 'paper')):
        assert {k: v for k,v in make_detector(model, ['a'], masks=False).task.items() if k in head_sizes[name]} == head_sizes[name]


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


# ---- how it is measured

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


def test_nothing_to_be_found_and_classes_that_are_absent(tmp_path, files, tiny):
    def empty(d): d['annotations'] = []
    with pytest.warns(UserWarning, match='average precision is undefined'): dls = coco_dls(*files, *changed(tmp_path, files, empty), device='cpu', num_workers=0)
    model = make_detector(tiny, dls.vocab, 'small', **sizes)
    with pytest.raises(AnnotationError, match='average precision is undefined'): evaluate_detector(model, dls)
    def fewer(d):
        d['categories'] = [dict(id=5, name='digit 1')]
        d['annotations'] = [dict(o, category_id=5) for o in d['annotations'] if o['category_id'] == 2]
    dls = coco_dls(*files, *changed(tmp_path, files, fewer), device='cpu', num_workers=0)
    assert math.isnan(evaluate_detector(model, dls)['box_per_class']['digit 0'])


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


def test_training_on_images_of_several_sizes(tmp_path):
    f = images_of_several_sizes(tmp_path)
    dls = coco_dls(*f, *f, bs=4, device='cpu', num_workers=0)
    learn = detect_learner(dls, mim_model('mae', 'vit_tiny_patch16_224', width=24, depth=1, heads=2, **pixels, seed=0), 'small', **sizes)
    quietly(learn, 'fit', 1)
    assert math.isfinite(learn.recorder.values[-1][0]) and learn.model.task['min_size'] == 25


def test_the_map_is_standardised_by_the_first_images_whatever_the_batch(files, tiny):
    first = [_unpadded_images(coco_dls(*files, img_size=(48, 64), bs=bs, num_workers=0, device='cpu').train, 4) for bs in (1, 2, 4)]
    assert all(len(o) == 4 and torch.equal(a, b) for o in first for a,b in zip(o, first[0]))
    std = detect_learner(coco_dls(*files, img_size=(48, 64), bs=2, num_workers=0, device='cpu'), tiny, 'small').model.standard.std
    assert not torch.equal(std, torch.ones_like(std))
    dls = coco_dls(*files, img_size=(48, 64), bs=2, num_workers=0, device='cpu')
    detect_learner(dls, tiny, 'small')
    assert dls.train.epoch == -1                                                # looking at images is no epoch


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


def run(scenes, tiny, folder, stop=None):
    "Two epochs whose states are saved; stopped after some steps, or gone on with"
    learn,cb = learner(scenes, tiny, drop_path=.3, bs=2), RunState(folder, best='mask_AP')
    if stop: cb.before_batch = lambda: cb.stop() if cb.training and cb.train_iter == stop else None
    try: quietly(learn, *(('resume', folder) if (folder/'state').exists() else ('fit_one_cycle', 2)), **({} if (folder/'state').exists() else dict(cbs=cb)))
    except KeyboardInterrupt: return None
    return learn


@pytest.fixture(scope='module')
def whole(scenes, tiny, tmp_path_factory): return run(scenes, tiny, tmp_path_factory.mktemp('whole'))


@pytest.mark.parametrize('stop', [1, 4])
def test_a_run_that_was_stopped_ends_with_the_same_weights(scenes, tiny, whole, tmp_path, stop):
    assert run(scenes, tiny, tmp_path, stop) is None
    halves = run(scenes, tiny, tmp_path)
    assert equal(state(whole.model), state(halves.model)) and whole.recorder.values[-1][:-1] == halves.recorder.values[-1][:-1]
    assert load_detector(tmp_path/'best.safetensors').vocab == whole.model.vocab


def test_a_run_goes_on_with_its_own_augmentation_alone(scenes, tiny, tmp_path):
    assert run(scenes, tiny, tmp_path, 1) is None
    with pytest.raises(ResumeError, match='augmentation'): quietly(learner(scenes, tiny, drop_path=.3, bs=2, img_size=(40, 48)), 'resume', tmp_path)


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
    learn = detect_learner(dls, blank, 'small', lr=3e-3, drop_path=0., layer_decay=1., scales=(2, 1, .5), width=48, convs=0, head_width=128, proposals=30, samples=16)
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
