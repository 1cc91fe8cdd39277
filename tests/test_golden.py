"""The losses of 20 training steps of each method are those that were recorded: a change of any number on the way shows here.

After a change that is meant, record anew and say in the commit why they differ: python tests/test_golden.py
"""
import json
import platform
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders

from common import quietly
from bootmae_nb.data import SeededDL
from bootmae_nb.learner import mim_learner

file = Path(__file__).with_name('golden.json')
methods = 'bootmae', 'mae', 'dbot'
sizes = dict(arch='vit_tiny_patch16_224', width=48, depth=2, heads=3, patch_size=8, pixel_width=48, pixel_depth=1, feature_depth=1)


class Waves:
    "40 images of a few waves each, from a seeded generator: no photograph and no decoder takes part"
    def __len__(self): return 40
    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        y,x = torch.meshgrid(*[torch.linspace(0, 1, 32)]*2, indexing='ij')
        f,phase = 12*torch.rand(3, 2, generator=g), 6*torch.rand(3, generator=g)
        return (.5 + .4*torch.stack([(a*x + b*y + p).sin() for (a, b),p in zip(f, phase)]),)


class Losses(Callback):
    "The loss of each training step"
    order = 90
    def before_fit(self): self.seen = []
    def after_batch(self):
        if self.training: self.seen.append(self.loss.item())


def losses(method):
    "20 steps on a CPU in float32"
    dl = lambda shuffle: SeededDL(Waves(), bs=8, shuffle=shuffle, num_workers=0, seed=5)
    learn = mim_learner(DataLoaders(dl(True), dl(False), device='cpu'), method=method, seed=5, **sizes, cbs=Losses())
    quietly(learn, 'fit_one_cycle', 4, 1e-3)
    return learn.losses.seen


@pytest.mark.parametrize('method', methods)
def test_twenty_steps_have_the_losses_that_were_recorded(method):
    want,got = json.loads(file.read_text())['losses'][method], losses(method)
    assert len(want) == 20 and got == pytest.approx(want, rel=1e-4)
    assert want[-1] < want[0]


if __name__ == '__main__':
    torch.set_num_threads(1)
    about = dict(torch=torch.__version__, machine=platform.machine())
    file.write_text(json.dumps(about | dict(losses={o: losses(o) for o in methods}), indent=1) + '\n')
    print(f'{file.name} written')
