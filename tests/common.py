"""What several test files use: quiet fits, whether two states are the same to the bit, annotated images,
scenes with label maps."""
import json

import numpy as np
import torch
from PIL import Image

from bootmae_nb.label_maps import segment_dls
from bootmae_nb.scenes import make_scene

classes = ['ground', 'zero', 'one'] # of `labelled_scenes`


def quietly(learn, verb, *args, **kw):
    "A verb of a learner without bars and rows"
    with learn.no_bar(), learn.no_logging(): return getattr(learn, verb)(*args, **kw)


def state(m): return {k: v.clone() for k,v in m.state_dict().items()}
def equal(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())


def labelled_scenes(count=8, size=(32, 48), seed=0, **kw):
    scenes = [make_scene(seed + i, size=size, **dict(digits=(0, 1), side=(16, 28), n=(2, 3)) | kw) for i in range(count)]
    return [(s.image, s.label_map()) for s in scenes]


def scene_loaders(items=None, valid=(6, 7), crop=(32, 48), bs=2, **kw):
    return segment_dls(items or labelled_scenes(), crop, bs, **dict(vocab=classes, valid=list(valid), device='cpu', num_workers=0, seed=3) | kw)


def changed(tmp_path, files, change):
    "The annotations with a change, as another file"
    d = json.loads(files[1].read_text())
    d = change(d) or d
    (tmp_path/'changed.json').write_text(json.dumps(d))
    return files[0], tmp_path/'changed.json'


def dls_of(scenes, **kw):
    "Loaders of a folder, two images in a batch"
    from bootmae_nb.coco import detect_dls
    return detect_dls(scenes, **dict(bs=2, device='cpu', num_workers=0) | kw)


def images_of_several_sizes(root):
    "Four images of different sizes with a thing in each: their folder, and the annotations"
    folder = root/'mixed'; folder.mkdir()
    d = dict(images=[], annotations=[], categories=[dict(id=1, name='thing')])
    for i,(h,w) in enumerate(((30, 50), (48, 20), (33, 33), (16, 64))):
        Image.fromarray(np.full((h, w, 3), 50*i, np.uint8)).save(folder/f'{i}.png')
        d['images'].append(dict(id=i, file_name=f'{i}.png', height=h, width=w))
        d['annotations'].append(dict(id=i + 1, image_id=i, category_id=1, bbox=[2, 3, 9, 10], segmentation=[[2, 3, 11, 3, 11, 13, 2, 13]]))
    (root/'mixed.json').write_text(json.dumps(d))
    return folder, root/'mixed.json'
