"Feature maps for images of any size"
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from bootmae_nb import checkpoints
from bootmae_nb.adapt import adapt_encoder
from bootmae_nb.checkpoints import CheckpointError, load_model, save_model, task_kind
from bootmae_nb.dense import Downstream, feature_maps, from_windows, global_blocks, pyramid_blocks, to_windows
from bootmae_nb.models import mim_model
from bootmae_nb.vit import Encoder

tiny = dict(arch='vit_tiny_patch16_224', img_size=(16, 24), patch_size=8, width=24, depth=4, heads=3, pixel_width=24, pixel_depth=1, pixel_heads=3)


@pytest.fixture(scope='module')
def model():
    m = mim_model('mae', **tiny, seed=0).eval()
    with torch.no_grad(): m.encoder.vit.pos_embed.copy_(torch.randn(m.encoder.vit.pos_embed.shape, generator=torch.Generator().manual_seed(0)))
    return m


@pytest.mark.parametrize('size', [(16, 24), (24, 16), (40, 8), (16, 16)])
def test_maps_are_the_tokens_of_a_model_of_that_size(model, size):
    x = torch.randn(2, 3, *size)
    own = adapt_encoder(model, size).eval()
    outs = own.encoder(x, keep=(0, 2, -1))
    for m,i in zip(feature_maps(model.encoder, x, (0, 2, -1)), (0, 2, -1)):
        torch.testing.assert_close(m, outs[i][:, 1:].transpose(1, 2).unflatten(2, own.grid), atol=1e-5, rtol=1e-4)


def test_maps_equal_timms_own():
    vit = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=0, dynamic_img_size=True).eval()
    x = torch.randn(1, 3, 48, 32)
    want = vit.forward_intermediates(x, indices=[0, 2], norm=False, intermediates_only=True)
    static = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=0)
    static.load_state_dict(vit.state_dict())
    for a,b in zip(feature_maps(Encoder(static).eval(), x, (0, 2)), want): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_an_odd_size_is_continued_with_the_mean(model):
    x = torch.randn(1, 3, 17, 29)
    got = feature_maps(model.encoder, x)[0]
    assert got.shape == (1, 24, 3, 4)
    torch.testing.assert_close(got, feature_maps(model.encoder, F.pad(x, (0, 3, 0, 7)))[0])


def test_gradients_reach_the_positions(model):
    m = adapt_encoder(model).requires_grad_(True)
    feature_maps(m.encoder, torch.randn(1, 3, 32, 32))[0].sum().backward()
    assert m.encoder.vit.pos_embed.grad[:, 1:].abs().sum() > 0


@pytest.mark.parametrize('grid,window', [((5, 7), 3), ((4, 4), 2), ((3, 2), 4), ((1, 9), 1)])
def test_windows_and_back(grid, window):
    x = torch.arange(2*grid[0]*grid[1]*3.).reshape(2, -1, 3)
    w = to_windows(x, grid, window)
    assert w.shape[1] == window**2 and torch.equal(from_windows(w, grid, window), x)
    assert torch.equal(w[0, 0], x[0, 0]) and w.sum() == x.sum()
    if grid[1] > window: assert torch.equal(w[1, 0], x[0, window])
    if window > 1 and grid[0] > 1: assert torch.equal(w[0, window], x[0, grid[1]])


def test_windows_separate_and_global_blocks_join(model):
    x = torch.randn(1, 3, 32, 48); y = x.clone(); y[..., -8:, -8:] += 1
    far = lambda **kw: (feature_maps(model.encoder, x, **kw)[0] - feature_maps(model.encoder, y, **kw)[0])[0, :, 0, 0].abs().max() > 1e-5
    assert not far(window=2, everywhere=()) and far(window=2) and far(window=2, everywhere=(-1,)) and far()
    assert not far(window=2, everywhere=(3,), blocks=(2,)) and far(window=2, everywhere=(2,), blocks=(2,))


def test_a_window_over_all_is_no_window_without_class_token():
    m = mim_model('mae', **tiny | dict(class_token=False), seed=0).eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(feature_maps(m.encoder, x, window=2, everywhere=())[0], feature_maps(m.encoder, x)[0], atol=1e-5, rtol=1e-4)


def test_which_blocks():
    assert pyramid_blocks(12) == (3, 5, 7, 11) and pyramid_blocks(1) == (0, 0, 0, 0) and global_blocks(12) == (2, 5, 8, 11) and global_blocks(3) == (0, 1, 2)
    assert all(0 <= min(pyramid_blocks(d)) <= max(pyramid_blocks(d)) == d - 1 and list(pyramid_blocks(d)) == sorted(pyramid_blocks(d)) for d in range(1, 50))
    with pytest.raises(ValueError, match='no blocks'): pyramid_blocks(0)


def test_what_cannot_be(model):
    with pytest.raises(ValueError, match=r'it takes \(B, 3, H, W\)'): feature_maps(model.encoder, torch.randn(1, 1, 16, 16))
    with pytest.raises(ValueError, match='window=0'): feature_maps(model.encoder, torch.randn(1, 3, 16, 16), window=0)
    with pytest.raises(ValueError, match='block 4 does not exist'): feature_maps(model.encoder, torch.randn(1, 3, 16, 16), (4,))


def test_checkpointing_changes_nothing(model):
    a,b = adapt_encoder(model).train(), adapt_encoder(model).train()
    b.encoder.checkpointing = True
    x = torch.randn(1, 3, 16, 24)
    for m in (a, b): feature_maps(m.encoder, x, window=2)[0].square().sum().backward()
    for p,q in zip(a.parameters(), b.parameters()):
        if p.grad is not None: torch.testing.assert_close(p.grad, q.grad)


def test_a_model_with_a_task_is_loaded_by_its_own_function(model, tmp_path):
    m = Downstream(adapt_encoder(model), dict(kind='segment', vocab=['a', 'b']))
    file = save_model(m, tmp_path/'m')
    with pytest.raises(CheckpointError, match="the task 'segment': load it with load_segmenter"): load_model(file)
    with pytest.raises(CheckpointError, match="without heads for the task 'detect'"): load_model(save_model(model, tmp_path/'n'), kind='detect')
    def make(config):
        task = config.pop('task')
        from bootmae_nb.models import model_from_config
        return Downstream(model_from_config(config), task)
    got = load_model(file, kind='segment', make=make)
    assert got.task == m.task and all(torch.equal(p, q) for p,q in zip(got.parameters(), m.parameters()))


def test_the_kind_of_a_file_is_told_without_its_tensors(model, tmp_path, monkeypatch):
    m = Downstream(adapt_encoder(model), dict(kind='segment', vocab=['a', 'b']))
    file,run = save_model(m, tmp_path/'m'), tmp_path/'run'
    run.mkdir(); save_model(m, run/'model'); encoder = save_model(model, tmp_path/'n')
    torch.save(dict(model=model.state_dict()), tmp_path/'theirs.pth'); save_file(model.state_dict(), tmp_path/'bare.safetensors')
    with monkeypatch.context() as c:
        c.setattr(checkpoints, 'load_file', None)
        assert [task_kind(o) for o in (file, str(file), run)] == ['segment']*3
        others = encoder, 'packaged', tmp_path/'theirs.pth', tmp_path/'bare.safetensors', tmp_path, tmp_path/'none', 'vit_small_patch16_224'
        assert [task_kind(o) for o in others] == [None]*7
    data = file.read_bytes(); file.write_bytes(data.replace(b'segment', b'segmemt', 1))
    assert file.read_bytes() != data
    with pytest.raises(CheckpointError, match='m.safetensors is damaged: its configuration'): task_kind(file)
    file.write_bytes(data[:50])
    with pytest.raises(CheckpointError, match='not a whole safetensors file'): task_kind(file)
