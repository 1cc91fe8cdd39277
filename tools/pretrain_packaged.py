"""Train the model that comes with the package: a small BootMAE on photographs and CIFAR-10, at 48 px first, then at 96 px.

    python tools/pretrain_packaged.py --photos imagenet_sample --cifar cifar10 --out runs/packaged

PHOTOS is a folder of photographs, CIFAR the folder of CIFAR-10 with `train/<class>` and `valid/<class>`. Stopped, the same command goes on where it was.
`tools/finish_packaged.py` writes the result into the package."""
import argparse
import os
from pathlib import Path

import pandas as pd
from bootmae_nb.checkpoints import save_model
from bootmae_nb.data import mim_dls
from bootmae_nb.learner import mim_learner
from bootmae_nb.runs import RunState, newest_info

ARCH = dict(arch='vit_tiny_patch16_224', patch_size=8, depth=6, pixel_width=192)
STAGES = dict(small=dict(img_size=48, photos=30, cifar=50_000, epochs=3, lr=1.5e-3),
              large=dict(img_size=96, photos=20, cifar=10_000, epochs=1, lr=1e-3))
SEED = 42


def files(folder):
    "The files of a folder, in one order on each machine, mixed"
    found = sorted((o for o in Path(folder).rglob('*.jpg')), key=lambda p: p.relative_to(folder).as_posix())
    return pd.Series(found).sample(frac=1, random_state=SEED).map(str).tolist()


def table(photos, cifar, repeat, n_cifar):
    "Files and whether they are for validation: 50 photographs and 150 images of CIFAR-10's test set are"
    photos, valid = files(photos), files(Path(cifar)/'valid')[:150]
    train = photos[50:]*repeat + files(Path(cifar)/'train')[:n_cifar]
    return pd.DataFrame([(o, False) for o in train] + [(o, True) for o in photos[:50] + valid], columns=['file', 'valid'])


def stage(name, args, weights):
    "Train a stage, or go on with it; where its model is"
    s, folder = STAGES[name], Path(args.out)/name
    if (folder/'model.safetensors').exists(): return folder/'model.safetensors'
    dls = mim_dls(table(args.photos, args.cifar, s['photos'], s['cifar']), img_size=s['img_size'], bs=64, min_scale=.25, valid_col='valid', num_workers=0, seed=SEED)
    learn = mim_learner(dls, method='bootmae', ema='run', clip=1., weights=weights, log_pictures=folder/'reconstructions', path=folder, **ARCH)
    learn.add_cb(RunState(folder, minutes=5, keep=2))
    with learn.no_bar():
        print(name, len(dls.train)*s['epochs'], 'steps', learn.recorder.metric_names if hasattr(learn.recorder, 'metric_names') else '', flush=True)
        if newest_info(folder): learn.resume(folder)
        else: learn.fit_one_cycle(s['epochs'], s['lr'], pct_start=.1)
    return save_model(learn.model, folder/'model', losses=[list(map(float, o)) for o in learn.recorder.values], stage=s, seed=SEED)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k in ('photos', 'cifar', 'out'): p.add_argument(f'--{k}', required=True, type=os.path.abspath)
    args, weights = p.parse_args(), None
    for name in STAGES: weights = stage(name, args, weights)
    print(weights)


if __name__ == '__main__': main()
