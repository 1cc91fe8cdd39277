"""What several test files use: quiet fits, whether two states are the same to the bit, scenes with label maps."""
import torch

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
