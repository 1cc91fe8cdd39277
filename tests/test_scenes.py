"Scenes to try segmentation and detection on"
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from bootmae_nb.scenes import make_scene, write_scenes


@pytest.mark.parametrize('seed', range(20))
def test_things_are_where_the_labels_say(seed):
    s = make_scene(seed, (64, 80))
    assert s.image.shape == (64, 80, 3) and len(s.classes) == len(s.masks) and set(s.classes) <= {0, 1, 2}
    assert s.masks.sum(0).max(initial=0) <= 1 and all(m.any() for m in s.masks)
    assert ((s.label_map() > 0) == s.masks.any(0)).all()
    bright = s.image.max(-1).astype(float)
    if s.masks.any(): assert bright[s.masks.any(0)].mean() > bright[~s.masks.any(0)].mean()


def test_both_layouts_tell_the_same(tmp_path):
    write_scenes(tmp_path, 6, 3, digits=(2, 5), size=(48, 64))
    assert (tmp_path/'codes.txt').read_text().split() == ['background', 'digit', '2', 'digit', '5']
    for part,n in (('train', 6), ('valid', 3)):
        coco = json.loads((tmp_path/'annotations'/f'instances_{part}.json').read_text())
        assert [c['name'] for c in coco['categories']] == ['digit 2', 'digit 5'] and len(coco['images']) == n
        for im in coco['images']:
            label = np.asarray(Image.open(tmp_path/part/'labels'/im['file_name']))
            assert Image.open(tmp_path/part/'images'/im['file_name']).size == (im['width'], im['height']) == (64, 48)
            want = np.zeros_like(label)
            for a in coco['annotations']:
                if a['image_id'] == im['id']:
                    m = coco_mask.decode(a['segmentation']).astype(bool); want[m] = a['category_id']
                    y,x = np.nonzero(m)
                    assert a['area'] == m.sum() and a['bbox'] == [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1]
            assert (want == label).all() and (part == 'valid' or im['id'] != 1 or label.any())


def test_the_seed_is_the_scene(tmp_path):
    assert (make_scene(5).image == make_scene(5).image).all() and (make_scene(5).image != make_scene(6).image).any()
    write_scenes(tmp_path/'a', 2, 1, seed=4)
    assert (np.asarray(Image.open(tmp_path/'a'/'valid'/'images'/'0000.png')) == make_scene(6).image).all()
