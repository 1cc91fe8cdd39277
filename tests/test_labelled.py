"""Labelled images: every kind of source, splits that keep the shares, few labels that nest, and loaders that read all formats."""
import os
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from bootmae_nb.images import ImageError
from bootmae_nb.labelled import few_labels, labelled_dls, labelled_items, labelled_tensors, plain_loader


def picture(i, mode='RGB', size=(20, 16)): return Image.new('RGB', size, (10*i % 256, 90, 255 - 10*i % 256)).convert(mode)


def fill(folder, classes, ext='png', mode='RGB'):
    "A folder of class folders with so many pictures each"
    for c,n in classes.items():
        (folder/c).mkdir(parents=True)
        for i in range(n): picture(i, mode).save(folder/c/f'{i}.{ext}')
    return folder


# few labels

@pytest.mark.parametrize('seed', [0, 7])
def test_few_labels_are_stratified_nested_and_the_same_again(seed):
    y = np.repeat([0, 1, 5], [200, 50, 7]); np.random.default_rng(seed).shuffle(y)
    sets = {n: few_labels(y, n, seed) for n in (1, 3, 7, .01, .1, .5, .98)}
    for n,want in {1: (1, 1, 1), 3: (3, 3, 3), 7: (7, 7, 7), .01: (2, 1, 1), .1: (20, 5, 1), .5: (100, 25, 4), .98: (196, 49, 7)}.items():
        assert tuple(np.bincount(y[sets[n]], minlength=6)[[0, 1, 5]]) == want and sets[n] == sorted(set(sets[n]))
    for small,large in [(1, 3), (3, 7), (.01, .1), (.1, .5), (.5, .98), (1, .01)]: assert set(sets[small]) <= set(sets[large])
    assert few_labels(torch.tensor(y), 3, seed) == few_labels(y.tolist(), 3, seed) == sets[3] != few_labels(y, 3, seed + 1)
    assert few_labels(y, 1., seed) == list(range(257))


def test_few_labels_of_a_class_do_not_depend_on_the_others():
    y = [0]*30 + [1]*30
    assert [i for i in few_labels(y, 5) if y[i] == 0] == few_labels([0]*30 + [2]*11, 5)[:5]


@pytest.mark.parametrize('n', [0, -1, 0., 1.5, -.1, True, '3', float('nan')])
def test_what_is_no_number_of_labels(n):
    with pytest.raises(ValueError, match='no number of labels'): few_labels([0, 0, 1, 1], n)


def test_a_class_with_fewer_images_than_asked_for():
    with pytest.raises(ValueError, match='for 1 of 2 classes: class 1 has 3. Ask for 3'): few_labels([0]*9 + [1]*3, 4)
    for bad in ([0., 1.], [[0, 1]], []):
        with pytest.raises(ValueError, match='labels'): few_labels(bad, 1)


# sources

def test_a_folder_of_classes(tmp_path):
    found = labelled_items(fill(tmp_path, dict(b=10, a=5, c=1)))
    assert found.vocab == ['a', 'b', 'c'] and np.bincount(found.labels).tolist() == [5, 10, 1]
    assert all(found.vocab[y] == p.parent.name for p,y in zip(found.items, found.labels))
    train, valid = found.split
    assert sorted(train + valid) == list(range(16)) and np.bincount([found.labels[i] for i in valid], minlength=3).tolist() == [1, 2, 0]
    assert labelled_items(tmp_path) == found != labelled_items(tmp_path, seed=1)
    half = labelled_items(tmp_path, valid_pct=.5).split[1]
    assert np.bincount([found.labels[i] for i in half], minlength=3).tolist() == [2, 5, 0]


@pytest.mark.parametrize('name', ['valid', 'val', 'test', 'Validation'])
def test_a_folder_with_splits(tmp_path, name):
    fill(tmp_path/'train', dict(x=3, y=2)); fill(tmp_path/name, dict(x=2, y=1))
    found = labelled_items(tmp_path)
    assert found.vocab == ['x', 'y'] and found.split == ([0, 1, 2, 3, 4], [5, 6, 7])
    assert all(found.items[i].parts[-3] == name for i in found.split[1])


def test_which_split(tmp_path):
    fill(tmp_path/'train', dict(x=3, y=2)); fill(tmp_path/'test', dict(x=2, y=1)); fill(tmp_path/'val', dict(x=1, y=1))
    assert len(labelled_items(tmp_path).split[1]) == 2 and len(labelled_items(tmp_path, valid='test').split[1]) == 3
    with pytest.raises(ValueError, match=r"no folder 'dev' for validation, only 'test', 'train', 'val'"): labelled_items(tmp_path, valid='dev')


def test_unknown_splits(tmp_path):
    fill(tmp_path/'train', dict(x=3, y=2)); fill(tmp_path/'dev', dict(x=2, y=1))
    with pytest.raises(ValueError, match="train beside 'dev'"): labelled_items(tmp_path)
    assert len(labelled_items(tmp_path, valid='dev').split[1]) == 3


def test_only_a_training_folder_and_a_class_called_train(tmp_path):
    fill(tmp_path/'a'/'train', dict(x=5, y=5))
    assert [len(o) for o in labelled_items(tmp_path/'a').split] == [8, 2]
    found = labelled_items(fill(tmp_path/'b', dict(train=5, plane=5)))
    assert found.vocab == ['plane', 'train']


def test_folders_that_are_no_classes(tmp_path):
    fill(tmp_path, dict(a=4, b=4, empty=0)); picture(0).save(tmp_path/'stray.png')
    (tmp_path/'.hidden').mkdir(); picture(0).save(tmp_path/'.hidden'/'0.png')
    with warnings.catch_warnings(record=True) as told: warnings.simplefilter('always'); found = labelled_items(tmp_path)
    text = ' '.join(str(o.message) for o in told)
    assert found.vocab == ['a', 'b'] and len(found.items) == 8 and "no classes: 'empty'" in text and 'stray.png' in text


def test_what_cannot_be_learnt(tmp_path):
    for classes,text in [(dict(a=5), "all images are of one class, 'a'"), (dict(a=0), 'no images in class folders')]:
        with pytest.raises(ValueError, match=text): labelled_items(fill(tmp_path/text[:5], classes))
    fill(tmp_path/'train', dict(x=3, y=2)); fill(tmp_path/'valid', dict(x=2, z=1))
    with pytest.raises(ValueError, match="1 classes are in validation but not in training, e.g. 'z'"): labelled_items(tmp_path)
    picture(0).save(tmp_path/'flat.png')
    with pytest.raises(ImageError, match='is no folder'): labelled_items(tmp_path/'flat.png')
    (tmp_path/'flat').mkdir(); picture(0).save(tmp_path/'flat'/'0.png')
    with pytest.raises(ImageError, match='1 images, but outside class folders'): labelled_items(tmp_path/'flat')


def test_pairs_and_tables(tmp_path):
    paths = [str(tmp_path/f'{i}.png') for i in range(6)]; labels = ['b', 'a', 'b', 'a', 'b', 'a']
    pairs = labelled_items(list(zip(paths, labels)), valid=[4, 5])
    table = pd.DataFrame(dict(file=[os.path.basename(o) for o in paths], kind=labels, held=[False]*4 + [True]*2))
    same = labelled_items(table, valid='held', label_col='kind', pref=tmp_path)
    assert pairs.vocab == same.vocab == ['a', 'b'] and pairs.labels == same.labels == [1, 0]*3 and pairs.split == same.split == ([0, 1, 2, 3], [4, 5])
    assert [str(o) for o in same.items] == pairs.items
    assert labelled_items(list(zip(paths, [3, 10, 3, 10, 3, 10])), valid=[True, True] + [False]*4).vocab == [3, 10]
    assert labelled_items(pd.DataFrame(dict(f=paths, y=np.array([1, 2]*3)))).vocab == [1, 2]
    for y,text in [(['a', None, 'b', 'a', 'b', 'a'], 'the label of image 1 is None'), ([1, 2.5]*3, 'image 1 is 2.5'), (['a', 1]*3, 'names and some are numbers'),
                   ([1., float('nan')]*3, 'image 1 is nan'), (['a', '']*3, "image 1 is ''")]:
        with pytest.raises(ValueError, match=text): labelled_items(list(zip(paths, y)))
    for valid,text in [('held', 'names a folder or a column'), ([6], 'indices below 6'), ([True], 'each of the 6'), (list(range(6)), 'left for training')]:
        with pytest.raises(ValueError, match=text): labelled_items(list(zip(paths, labels)), valid=valid)
    with pytest.raises(ValueError, match='item 0 is a str and no pair'): labelled_items(paths)
    with pytest.raises(TypeError, match='int is no source'): labelled_items(3)
    with pytest.raises(ValueError, match="no column 'kind2'"): labelled_items(table, label_col='kind2')


def test_the_same_file_twice_goes_to_one_side():
    names = [f'{i//2}.png' for i in range(60)]
    found = labelled_items(list(zip(names, [i % 4//2 for i in range(60)])), valid_pct=.5)
    assert not {found.items[i] for i in found.split[0]} & {found.items[i] for i in found.split[1]} and found.split[1]


# loaders

def test_all_formats_and_modes_become_images_and_broken_ones_are_named(tmp_path):
    fill(tmp_path, dict(a=6), 'png', 'RGBA'); fill(tmp_path, dict(b=6), 'jpg', 'L'); fill(tmp_path, dict(c=6), 'tiff', 'CMYK')
    (tmp_path/'a'/'bad.png').write_bytes(b'\x89PNG....'); (tmp_path/'b'/'cut.jpg').write_bytes((tmp_path/'b'/'0.jpg').read_bytes()[:200])
    for chans in (1, 3, 4):
        with pytest.warns(UserWarning, match='2 of 20 images cannot be read'): dls = labelled_dls(tmp_path, (8, 12), bs=5, in_chans=chans, num_workers=0, device='cpu')
        assert {os.path.basename(o) for o in dls.left_out} == {'bad.png', 'cut.jpg'} and dls.vocab == ['a', 'b', 'c'] and dls.c == 3
        for dl in (dls.train, dls.valid, plain_loader(dls)):
            x, y = labelled_tensors(dl)
            assert x.shape[1:] == (chans, 8, 12) and x.min() >= 0 and x.max() <= 1 and y.dtype == torch.int64 and y.max() < 3
        assert len(dls.train_ds) + len(dls.valid_ds) == 18


def test_labels_belong_to_their_images():
    shades = [(np.full((16, 16), 20*c + i, np.uint8), c) for c in range(10) for i in range(8)]
    dls = labelled_dls(shades, 8, bs=7, in_chans=1, device='cpu', num_workers=0)
    for dl in (dls.train, dls.valid, plain_loader(dls)):
        x, y = labelled_tensors(dl)
        assert torch.equal((x.mean((1, 2, 3))*255).round().long()//20, y)
    x, y = labelled_tensors(plain_loader(dls))
    assert len(x) == 60 and len(x.unique()) == 60                            # each once


def test_training_is_random_and_repeatable_and_plain_is_not():
    pics = [(np.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=np.uint8), i % 2) for i in range(20)]
    make = lambda **kw: labelled_dls(pics, 16, bs=32, device='cpu', num_workers=0, **kw)
    a, b = make(), make()
    first, again, other = labelled_tensors(a.train), labelled_tensors(b.train), labelled_tensors(a.train)
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert torch.equal(labelled_tensors(plain_loader(a))[0], labelled_tensors(plain_loader(a))[0])
    squished = labelled_tensors(make(resize='squish').valid)[0]
    i = make().valid_ds.items[0][0]
    want = np.asarray(Image.fromarray(i).resize((16, 16), Image.Resampling.BICUBIC))
    assert np.array_equal((squished[0]*255).round().byte().permute(1, 2, 0).numpy(), want)
    crop = np.asarray(Image.fromarray(i).crop((5, 0, 25, 20)).resize((16, 16), Image.Resampling.BICUBIC))
    assert np.abs((labelled_tensors(make().valid)[0][0]*255).permute(1, 2, 0).numpy() - crop).max() <= 1.01


def test_few_labels_leave_validation_whole():
    full, few = (labelled_dls('digits', 16, in_chans=1, labels=n, device='cpu', num_workers=0) for n in (None, 4))
    assert len(few.train_ds) == 40 and len(few.valid_ds) == len(full.valid_ds)
    ids = lambda dls: {o[0].tobytes() for o in dls.train_ds.items}
    assert ids(few) < ids(full) and np.bincount([o[1] for o in few.train_ds.items]).tolist() == [4]*10


def test_arguments_of_loaders():
    for kw,text in [(dict(bs=0), 'bs=0'), (dict(in_chans=2), 'in_chans=2'), (dict(min_scale=0), 'min_scale=0'), (dict(resize='pad'), "resize='pad'"),
                    (dict(img_size=0), 'img_size=0'), (dict(valid_pct=0), 'valid_pct=0'), (dict(labels=10**4), '10000 labels per class')]:
        with pytest.raises(ValueError, match=text): labelled_dls('digits', **dict(img_size=8) | kw)
    from bootmae_nb.data import mim_dls
    with pytest.raises(TypeError, match='make them with labelled_dls'): plain_loader(mim_dls(img_size=16, num_workers=0, device='cpu'))


def test_a_class_whose_training_images_are_all_broken(tmp_path):
    fill(tmp_path/'train', dict(a=3, b=3)); fill(tmp_path/'valid', dict(a=2, b=2))
    for o in (tmp_path/'train'/'b').iterdir(): o.write_bytes(b'')
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="in validation but not in training, e.g. 'b'"): labelled_dls(tmp_path, 8, device='cpu')


def test_an_image_is_predicted_as_validation_images_are(tmp_path):
    from fastai.learner import load_learner
    from bootmae_nb.finetune import finetune_learner
    from bootmae_nb.models import mim_model
    found = labelled_items('digits')
    for i in (*found.split[0][:40], *found.split[1][:10]):
        part = 'train' if i in found.split[0][:40] else 'valid'
        where = tmp_path/part/str(found.vocab[found.labels[i]]); where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(found.items[i])).resize((24, 16)).save(where/f'{i}.png')
    for o in (tmp_path/'valid').iterdir(): (tmp_path/'train'/o.name).mkdir(exist_ok=True)
    model = mim_model('mae', 'vit_tiny_patch16_224', img_size=16, patch_size=8, width=32, depth=1, heads=2, seed=0)
    for resize in 'crop', 'squish':
        dls = labelled_dls(tmp_path, 16, bs=8, resize=resize, num_workers=0)
        learn = finetune_learner(dls, model, path=tmp_path)
        want, _ = learn.get_preds()
        files = [o[0] for o in dls.valid_ds.items]
        for o, w in zip(files[:3], want): torch.testing.assert_close(learn.predict(o)[1], w, atol=1e-5, rtol=1e-4)
        learn.export(f'{resize}.pkl')
    again = load_learner(tmp_path/'squish.pkl')
    torch.testing.assert_close(again.predict(files[0])[1], want[0], atol=1e-5, rtol=1e-4)
