"""Label maps as data: layouts and classes of files, numbers and classes, crops, batches, pictures, and what is wrong said with the name of the file."""
import numpy as np
import pytest
import torch
from PIL import Image

from common import classes, labelled_scenes, scene_loaders
from bootmae_nb.images import ImageError
from bootmae_nb.label_maps import (CropPair, LabelCodes, WholePair, class_colours, label_codes, label_picture, legend, open_label, pair_files, segment_dls,
                                   segment_items, segment_sheet)
from bootmae_nb.scenes import write_scenes


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp('scenes'), 6, 3, size=(32, 48), digits=(0, 1))


# ---- data

def test_layouts_are_found(tmp_path, folder):
    write_scenes(tmp_path/'ade', 3, 2, size=(16, 24))
    ade = tmp_path/'ADE'
    for kind,there in (('images', 'images'), ('annotations', 'labels')):
        (ade/kind).mkdir(parents=True)
        for part,here in (('training', 'train'), ('validation', 'valid')): (tmp_path/'ade'/here/there).rename(ade/kind/part)
    (ade/'objectInfo150.txt').write_text('Idx\tRatio\tTrain\tVal\tName\n1\t.1\t3\t2\twall\n2\t.1\t3\t2\tbuilding, edifice\n3\t.1\t3\t2\tsky\n')
    found = segment_items(ade)
    assert found.codes == LabelCodes(('wall', 'building', 'sky'), (1, 2, 3), (0, 255)) and [len(o) for o in found.split] == [3, 2]
    y = segment_dls(ade, 16, 2, device='cpu', num_workers=0).valid.one_batch()[1]
    assert set(y.unique().tolist()) <= {0, 1, 2, 255} and 255 in y
    one = tmp_path/'one'; one.mkdir()
    for o in ('images', 'labels'):
        (one/o).mkdir()
        for p in (folder/'train'/o).iterdir(): (one/o/p.name).write_bytes(p.read_bytes())
    a,b = segment_items(one, classes, seed=1), segment_items(one, classes, seed=1)
    assert a.split == b.split and len(a.split[1]) == 1 and sorted(a.split[0] + a.split[1]) == list(range(6))


def test_endings_of_label_maps(tmp_path):
    for d,ends in (('images', ['a.jpg', 'b.jpg']), ('labels', ['a_L.png', 'b_L.png', 'c_L.png'])):
        (tmp_path/d).mkdir()
        for n in ends: Image.new('L', (8, 8)).save(tmp_path/d/n)
    with pytest.warns(UserWarning, match='1 label maps .* belong to no image'): got = pair_files(tmp_path/'images', tmp_path/'labels')
    assert [(a.name, b.name) for a,b in got] == [('a.jpg', 'a_L.png'), ('b.jpg', 'b_L.png')]
    (tmp_path/'labels'/'b_L.png').unlink()
    with pytest.raises(ImageError, match=r'2 of 2 images have no label map|1 of 2 images have no label map'): pair_files(tmp_path/'images', tmp_path/'labels')
    own = pair_files(tmp_path/'images', tmp_path/'labels', lambda p: tmp_path/'labels'/'a_L.png')
    assert own[1][1].name == 'a_L.png'


def test_crops_follow_from_seed_and_epoch_and_move_image_and_labels_alike():
    y = np.kron(np.arange(24).reshape(4, 6) % 7, np.ones((10, 10), int)); im = np.repeat((y*30).astype(np.uint8)[..., None], 3, 2)
    dls = scene_loaders([(im, y.astype(np.uint8))]*3, [2], (20, 28), vocab=list('abcdefg'), scale=(1, 1), colour=False)
    x,m = dls.train.one_batch()
    assert ((x[:, 0]*255/30 - m).abs() < .6).float().mean() > .9, 'image and labels are cut at the same place'
    b = [scene_loaders([(im, y.astype(np.uint8))]*3, [2], (20, 28), vocab=list('abcdefg')).train.one_batch() for _ in range(2)]
    assert torch.equal(b[0][0], b[1][0]) and torch.equal(b[0][1], b[1][1])


def test_crops_are_filled_with_the_mean_and_not_counted():
    f = CropPair((40, 60), scale=(.5, .5), fill=(10, 20, 30))
    im,lab = f((Image.new('RGB', (60, 40), 'white'), Image.new('L', (60, 40), 2)))
    x,y = np.asarray(im), np.asarray(lab)
    assert x.shape == (40, 60, 3) and (y[:20, :30] == 2).all() and (y[20:] == 255).all() and (x[25, 40] == (10, 20, 30)).all()


def test_no_class_comes_from_between_two_others():
    y = np.kron([[0, 200], [200, 0]], np.ones((24, 30))).astype(np.uint8)
    pair = Image.new('RGB', (60, 48)), Image.fromarray(y)
    crops = (CropPair((30, 40), 37, (.9, .9), max_share=1.), (40, 30)), (CropPair((90, 90), 95), (90, 90))
    for move,size in (WholePair(37), (46, 37)), (WholePair(95), (119, 95)), *crops:
        im,lab = move(pair)
        assert im.size == lab.size == size and set(np.unique(np.asarray(lab))) <= {0, 200, 255}, move


def test_no_class_has_most_of_a_crop_if_that_can_be_had():
    y = np.zeros((64, 64), np.uint8); y[:, 48:] = 1; im = np.zeros((64, 64, 3), np.uint8)
    def share(most):
        dls = scene_loaders([(im, y)]*40, [39], 24, 39, vocab=['a', 'b'], max_share=most, scale=(1, 1))
        return ((dls.train.one_batch()[1] == 0).float().mean((1, 2)) > .75).float().mean()
    assert share(.75) < .35 < share(1.)


def test_grey_and_transparent_files(folder):
    for chans in (1, 4):
        dls = segment_dls(folder, 24, 2, in_chans=chans, device='cpu', num_workers=0)
        assert dls.train.one_batch()[0].shape == (2, chans, 24, 24)


# ---- what is wrong with data is said, with the name of the file

def broken(folder, tmp_path, part, name, write):
    root = tmp_path/'data'
    for p in folder.rglob('*'):
        if p.is_file(): (root/p.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True); (root/p.relative_to(folder)).write_bytes(p.read_bytes())
    write(root/'train'/part/name)
    return root


def png(*args): return lambda p: Image.new(*args).save(p)


@pytest.mark.parametrize('part,write,says', [
    ('labels', png('L', (48, 32), 9), r'0002.png has the number 9 at 1536 pixels, which stands for no class: the 3 classes are 0 to 2, 255 are left out'),
    ('labels', png('L', (20, 30)), r'labels/0002.png has 20 x 30 pixels, and its image .*images/0002.png 48 x 32'),
    ('labels', lambda p: p.unlink(), r'1 of 6 images have no label map in .*labels, e.g. .*images/0002.png'),
    ('labels', lambda p: p.write_text('<html>'), r'labels/0002.png holds a web page'),
    ('labels', lambda p: p.write_bytes(p.read_bytes()[:60]), r'labels/0002.png'),
    ('images', lambda p: p.write_bytes(b''), r'images/0002.png is empty'),
    ('labels', png('RGB', (48, 32), 'red'), r'labels/0002.png is a colour picture')])
def test_errors_name_the_file(folder, tmp_path, part, write, says):
    root = broken(folder, tmp_path, part, '0002.png', write)
    with pytest.raises(ImageError, match=says): segment_dls(root, 24, 2, check='full', device='cpu', num_workers=0)
    if 'number 9' in says or 'colour' in says:
        dls = segment_dls(root, 24, 2, device='cpu', num_workers=0)
        with pytest.raises(ImageError, match=says): list(dls.train)


def test_labels_as_jpeg_empty_folders_and_other_layouts(folder, tmp_path):
    Image.new('L', (8, 8)).save(tmp_path/'a.jpg')
    with pytest.raises(ImageError, match='a.jpg is a JPEG'): open_label(tmp_path/'a.jpg')
    (tmp_path/'images').mkdir(); (tmp_path/'labels').mkdir()
    with pytest.raises(ImageError, match='images holds no images'): segment_items(tmp_path, classes)
    with pytest.raises(ImageError, match='has neither train/images nor images'): segment_items(tmp_path/'images', classes)
    with pytest.raises(ImageError, match='is no folder'): segment_items(tmp_path/'none', classes)
    (tmp_path/'labels').rmdir()
    with pytest.raises(ImageError, match='none for the label maps'): segment_items(tmp_path, classes)
    nameless = broken(folder, tmp_path, '..', 'codes.txt', lambda p: p.unlink())
    with pytest.raises(ValueError, match='does not tell the names of the classes'): segment_items(nameless)
    with pytest.raises(ValueError, match="a list does not tell"): segment_items(labelled_scenes(2))


def test_label_maps_in_other_modes(tmp_path):
    y = np.arange(12, dtype=np.uint8).reshape(3, 4)
    p = Image.fromarray(y); p.putpalette(list(range(256))*3); p.save(tmp_path/'p.png')
    Image.fromarray(y.astype(np.uint16)*100).save(tmp_path/'i.png')
    Image.fromarray(np.repeat(y[..., None], 3, 2)).save(tmp_path/'rgb.png')
    assert (open_label(tmp_path/'p.png') == y).all() and (open_label(tmp_path/'i.png') == y*100.).all() and (open_label(tmp_path/'rgb.png') == y).all()
    many = label_codes([f'c{i}' for i in range(300)])
    assert many.void == 65535 and many.encode(np.array([[299]])).dtype == np.int32 and many.decode(np.array([299])).dtype == np.uint16


@pytest.mark.parametrize('kw,says', [(dict(bs=0), 'batch size'), (dict(crop=0), 'img_size'), (dict(side=0), 'short side'), (dict(scale=(2, 1)), 'range of scales'),
    (dict(max_share=0), 'max_share'), (dict(in_chans=2), 'in_chans=2'), (dict(check='some'), 'check='),
    (dict(ignore='sky'), "ignore='sky'"), (dict(vocab=['a']), 'one class'),
    (dict(vocab=['a', 'a', 'b']), 'named twice')])
def test_arguments_of_loaders(kw, says):
    with pytest.raises(ValueError, match=says): scene_loaders(**kw)


# ---- pictures

def test_pictures():
    y = np.array([[0, 1], [2, 255]])
    pic = np.asarray(label_picture(y, class_colours(3)))
    assert [tuple(o) for o in pic.reshape(-1, 3)] == [*map(tuple, class_colours(3)), (127, 127, 127)]
    over = np.asarray(label_picture(y, class_colours(3), Image.new('RGB', (2, 2), 'red')))
    assert tuple(over[1, 1]) == (255, 0, 0), 'without a label the image is seen'


def test_a_sheet_has_sharp_classes_and_a_legend_of_those_that_occur():
    red,green,blue = colours = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    is_colour = lambda x, c: (x == c).all(-1)
    x = np.asarray(legend(['a', 'b'], [red, blue], 300))[10]
    assert is_colour(x, red).argmax() < is_colour(x, blue).argmax() and x.shape[0] < 300
    sheet = np.asarray(segment_sheet([[Image.new('RGB', (4, 2)), np.array([[0, 2, 0, 255]]*2)]], ['image', 'labels'], ['a', 'b', 'c'], colours, opacity=1.))
    labels,below = sheet[28:156, 268:524], sheet[-15]
    assert [[o.any() for o in (is_colour(p, c) for c in colours)] for p in (labels, below)] == [[True, False, True]]*2
    assert {tuple(o) for o in labels.reshape(-1, 3)} == {red, blue, (0, 0, 0)}, 'without a label the image is seen'
    assert 0 < is_colour(below, red).argmax() < is_colour(below, blue).argmax()
