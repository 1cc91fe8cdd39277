"""Write the pretrained model into the package: weights in half precision, a JSON of facts, and a model card.

    python tools/finish_packaged.py --run runs/packaged --photos imagenet_sample --cifar cifar10 --log pretrain.log

RUN is the folder that `tools/pretrain_packaged.py` wrote, PHOTOS and CIFAR the folders that it read, LOG what it printed. Every number of the card is read from these or
measured here; only the hardware is told in words. It takes some minutes."""
import argparse
import json
import os
import re
from pathlib import Path

import numpy as np
import torch
from bootmae_nb.checkpoints import load_model, save_model
from bootmae_nb.evaluate import encoder_features, knn_accuracy
from bootmae_nb.files import write_whole
from bootmae_nb.hub import model_card
from bootmae_nb.images import open_image, sample_photo, sample_photos
from bootmae_nb.losses import mim_losses, mim_targets, token_loss
from bootmae_nb.models import model_from_config
from bootmae_nb.viz import fit_image, mask_for, model_input
from pretrain_packaged import STAGES, files
from torch.nn.functional import avg_pool2d

OUT = Path(__file__).resolve().parents[1]/'bootmae_nb'/'data'
NAME, LICENCE = 'bootmae_tiny', 'apache-2.0'
COLUMNS = 'train_loss', 'valid_loss', 'valid_pixels', 'valid_features', 'target_variance'


# what the run tells

def stage_facts(folder):
    "What a stage did, from its model's JSON and the last state of its run"
    about = json.loads((folder/'model.json').read_text())
    state = max((json.loads(o.read_text()) for o in (folder/'state').glob('*.json')), key=lambda o: o['train_iter'])
    s = state['settings']
    if not state['finished']: raise SystemExit(f"the run in {folder} is not finished: go on with tools/pretrain_packaged.py")
    return dict(img_size=about['stage']['img_size'], epochs=about['stage']['epochs'], steps=state['train_iter'], batch=s['batch_size'], images=s['images'][0]['number'],
                photo_repeats=about['stage']['photos'], cifar_images=about['stage']['cifar'], valid_images=s['images'][1]['number'], highest_lr=about['stage']['lr'],
                weight_decay=s['optimizer']['wd'], clip=s['callbacks']['FiniteGuard']['clip'], mask=s['mask'].partition('(')[0], seed=about['seed'],
                losses=[dict(zip(COLUMNS, (round(v, 4) for v in row))) for row in about['losses']])


def hours(log, epochs):
    "Hours of training, from the times at the ends of the lines of a log; epochs that it does not tell of count as the mean of the others"
    times = [sum(int(o)*60**i for i, o in enumerate(reversed(t.split(':')))) for t in re.findall(r"'(\d+(?::\d\d)+)'\]", Path(log).read_text())]
    if not times: raise SystemExit(f"{log} tells no times of epochs: give what tools/pretrain_packaged.py printed")
    return round(sum(times)/len(times)*epochs/3600, 1)


# what is measured

def labelled(found, size):
    "Images `(N, 3, size, size)` with values from 0 to 1, and their labels, from files in folders named by class"
    classes = sorted({Path(o).parent.name for o in found})
    x = np.stack([np.asarray(fit_image(open_image(o), (size, size))) for o in found])
    return torch.from_numpy(x).permute(0, 3, 1, 2), torch.tensor([classes.index(Path(o).parent.name) for o in found])


def features(model, x): return torch.cat([encoder_features(model, o/255)[0] for o in x.split(256)])


def knn_results(model, untrained, cifar, n_train, n_valid):
    "k-NN accuracy on CIFAR-10 of the model, of the same network untrained, and of the pixels; images whose loss was watched in training are left out"
    size = model.img_size[0]
    (x, y), (vx, vy) = labelled(files(Path(cifar)/'train')[:n_train], size), labelled(files(Path(cifar)/'valid')[150:150 + n_valid], size)
    acc = {k: knn_accuracy(features(m, x), y, features(m, vx), vy) for k, m in dict(pretrained=model, untrained=untrained).items()}
    raw = [avg_pool2d(o/255, size//32).flatten(1) for o in (x, vx)]
    acc['raw_pixels'] = knn_accuracy(raw[0], y, raw[1], vy)
    return dict(train_images=len(x), test_images=len(vx), k=20, **{k: round(v, 4) for k, v in acc.items()})


@torch.no_grad()
def share_of_guess(model, n_masks=8):
    "Error on hidden patches of the sample photographs as a share of that of a constant guess: zero for normalised pixels, the mean of all patches for features"
    x, total = torch.cat([model_input(model, sample_photo(o.name)) for o in sample_photos()]), {}
    for seed in range(n_masks):
        mask = mask_for(model, None, len(x), seed)
        targets = mim_targets(model, x, mask, weight_map=False)
        for k, loss in mim_losses(model.method, model(x, mask), targets).items():
            targ = targets[k][0]
            guess = torch.zeros_like(targ) if k == 'pixels' else targ.mean((0, 1)).expand_as(targ)
            err, ref = total.get(k, (0., 0.))
            total[k] = err + loss.mean().item(), ref + token_loss(guess, targ, model.method.loss).mean().item()
    return dict(photographs=len(x), masks=n_masks, **{k: round(a/b, 4) for k, (a, b) in total.items()})


# the card

def rows(head, body): return '\n'.join(f"| {' | '.join(map(str, o))} |" for o in (head, ['---']*len(head), *body))


def stage_rows(stages):
    names = dict(img_size='image size in px', images='images in an epoch', photo_repeats='of these, each photograph so often',
                 cifar_images='of these, images of CIFAR-10', epochs='epochs', steps='steps', batch='batch', highest_lr='highest learning rate',
                 weight_decay='weight decay', clip='gradients clipped at', mask='mask', seed='seed')
    return rows(['', *stages], [[text, *(o[k] for o in stages.values())] for k, text in names.items()])


def loss_rows(stages):
    return rows(['stage', 'epoch', *(o.replace('_', ' ') for o in COLUMNS)],
                [[name, i, *(f'{row[c]:.3f}' for c in COLUMNS)] for name, s in stages.items() for i, row in enumerate(s['losses'], 1)])


TEXTS = {
    'Data': """
{photographs} photographs of ImageNet from {classes} of its classes, of which {photographs_held_out} were kept for validation, and images of
CIFAR-10's training set: {cifar_images:,} in the first stage and a part of them in the second. No labels were used. The photographs that
`sample_photos` lists, and that the notebooks and the demo show, are not among them.""",
    'Training': """
In two stages, by `tools/pretrain_packaged.py`: random crops (a quarter of an image or more) and flips, AdamW, one cycle, a teacher whose momentum is
scaled to the run. About {hours:g} hours on {hardware}.

{stage_table}

Losses after each epoch; pixels and features are parts of the validation loss, and values of the two stages cannot be compared:

{loss_table}""",
    'How good it is': """
k-NN (k = {k}) on CIFAR-10, images enlarged to {img_size} px, {train_images:,} training images with labels, {test_images:,} of the test set:

{knn_table}

Error on hidden patches of {sample_photographs} sample photographs under {masks} masks each, as a share of that of a constant guess (the mean of each
patch and channel for pixels, the mean of all features for features); lower is better:

{share_table}""",
    'Intended use': """
To see what a masked autoencoder does: in the demo, the explorer and the notebooks; to start short trainings from; to test programs. It is no model to
build on.""",
    'Limits': """
Small, trained for a short time on few images of few kinds: its fillings are blurred, it knows little of the world, and what it knows has the biases
of its images. The mean and contrast of a hidden patch are never predicted; pictures take them from the original. It is not meant for decisions about
people, nor for making images.""",
    'Terms of the images': """
ImageNet gives access to its photographs for non-commercial research and education; their rights stay with their owners. CIFAR-10 was made for
research from a collection of web images and states no licence. Neither data set is part of this package. Use the weights accordingly: for research
and education.""",
    'File': """
`{file}.safetensors`, {size:.1f} MB in half precision, SHA-256 `{sha256}`. `{file}.json` beside it holds all numbers of this card."""}


def sections(facts, size):
    "Title -> text, filled with the facts of a JSON"
    stages, knn, share, untrained = facts['training']['stages'], facts['knn_cifar10'], facts['share_of_constant_guess'], facts['share_untrained']
    percent = lambda *v: [f'{o:.1%}' for o in v]
    tables = dict(stage_table=stage_rows(stages), loss_table=loss_rows(stages),
                  knn_table=rows(['features', 'accuracy'], [['this model', *percent(knn['pretrained'])], ['the same network, untrained', *percent(knn['untrained'])],
                                                            ['raw pixels', *percent(knn['raw_pixels'])]]),
                  share_table=rows(['', 'pixels', 'features'], [['this model', *percent(share['pixels'], share['features'])],
                                                                ['the same network, untrained', *percent(untrained['pixels'], untrained['features'])]]))
    values = facts['data'] | facts['training'] | knn | tables | dict(
        sample_photographs=share['photographs'], masks=share['masks'], file=NAME, size=size/1e6, sha256=facts['sha256'], img_size=facts['config']['img_size'][0])
    return {k: v.strip().format(**values) for k, v in TEXTS.items()}


def write_model(run, photos, cifar, log, hardware, out=OUT, n_train=5000, n_valid=2000):
    "Measure, and write weights, JSON and card; the card's path"
    stages = {name: stage_facts(Path(run)/name) for name in STAGES}
    model = load_model(Path(run)/list(STAGES)[-1])
    untrained, found = model_from_config(model.config).eval(), files(photos)
    file = save_model(model, Path(out)/NAME, half=True)
    stored = load_model(file)                                          # what is measured is what comes with the package
    facts = dict(
        data=dict(photographs=len(found), classes=len({Path(o).parent.name for o in found}), photographs_held_out=50,
                  cifar_images=max(o['cifar_images'] for o in stages.values())),
        training=dict(hours=hours(log, sum(o['epochs'] for o in stages.values())), hardware=hardware, stages=stages),
        knn_cifar10=knn_results(stored, untrained, cifar, n_train, n_valid), share_of_constant_guess=share_of_guess(stored),
        share_untrained=share_of_guess(untrained), licence=LICENCE)
    save_model(model, file, half=True, **facts)
    return write_card(file)


def write_card(file):
    "The card of a model, from the JSON beside it; its path"
    about, model = json.loads(file.with_suffix('.json').read_text()), load_model(file)
    what = f"It comes with bootmae_nb, `load_model('packaged')`: small, trained on {about['data']['photographs']} photographs and CIFAR-10, and there to be looked at."
    card = model_card(model, 'packaged', LICENCE, what, title=NAME, sections=sections(about, file.stat().st_size))
    return write_whole(file.with_name('README.md'), lambda p: p.write_text(card.content.rstrip() + '\n'))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k in ('run', 'photos', 'cifar', 'log'): p.add_argument(f'--{k}', required=True, type=os.path.abspath)
    p.add_argument('--hardware', default='two processor cores that other programs used too', help='what it was trained on, in words')
    p.add_argument('--out', default=OUT, type=Path, help='folder to write; bootmae_nb/data if not given')
    p.add_argument('--n-train', default=5000, type=int, help='labelled images for k-NN')
    p.add_argument('--n-valid', default=2000, type=int, help='images that k-NN predicts')
    print(write_model(**vars(p.parse_args())).read_text())


if __name__ == '__main__': main()
