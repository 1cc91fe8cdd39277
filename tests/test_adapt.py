"An encoder from any source, for images of any size"
import pytest, timm, torch
from timm.layers import resample_abs_pos_embed

from common import equal, state
from bootmae_nb.adapt import adapt_encoder, encoder_at, encoder_source
from bootmae_nb.checkpoints import from_timm, load_weights, save_model
from bootmae_nb.evaluate import encoder_features
from bootmae_nb.finetune import make_classifier
from bootmae_nb.models import mim_model
from bootmae_nb.vit import make_encoder

tiny = dict(arch='vit_tiny_patch16_224', patch_size=4, width=16, depth=3, heads=2, pixel_width=16, pixel_depth=1, feature_depth=1)


@pytest.fixture(scope='module')
def model(): return mim_model('bootmae', **tiny, img_size=8, seed=0)


def test_a_model_of_the_size_is_the_model_itself(model):
    assert encoder_at(model) is model and encoder_at(model, 8) is model and encoder_at(model, [8, 8]) is model


@pytest.mark.parametrize('size', [16, (8, 16), (24, 12)])
def test_positions_are_resized_as_load_weights_does(size, model, tmp_path):
    file = save_model(model, tmp_path/'m')
    hw = (size, size) if isinstance(size, int) else size
    got,want = encoder_at(file, size), mim_model('bootmae', **tiny, img_size=hw, seed=9)
    load_weights(want, file, decoders=False)
    assert got.img_size == hw and got.grid == (hw[0]//4, hw[1]//4) and not got.decoders and not got.training
    assert equal(state(got.encoder), state(want.encoder))
    x = torch.rand(2, 3, *hw)
    assert torch.equal(encoder_features(got, x)[0], encoder_features(want, x)[0])


@pytest.mark.parametrize('src,dst', [((8, 12), (16, 16)), ((16, 36), (8, 8)), ((8, 16), (16, 8))])
def test_positions_of_a_wide_grid_are_not_taken_for_those_of_a_square(src, dst):
    wide = mim_model('mae', **{k: v for k,v in tiny.items() if k != 'feature_depth'}, img_size=src, seed=0)
    with torch.no_grad(): wide.encoder.vit.pos_embed.copy_(torch.randn(wide.encoder.vit.pos_embed.shape, generator=torch.Generator().manual_seed(0)))
    want = resample_abs_pos_embed(wide.encoder.vit.pos_embed, [o//4 for o in dst], [o//4 for o in src], wide.encoder.n_prefix)
    got = encoder_at(wide, dst)
    assert torch.equal(got.encoder.vit.pos_embed, want) and torch.equal(got.encoder.vit.blocks[1].mlp.fc1.weight, wide.encoder.vit.blocks[1].mlp.fc1.weight)



def test_every_source_gives_the_same_encoder(model, tmp_path):
    file = save_model(model, tmp_path/'m')
    vit = timm.create_model('vit_tiny_patch16_224', img_size=8, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=0)
    vit.load_state_dict(model.encoder.vit.state_dict(), strict=False)
    stats = (.4, .5, .6), (.2, .3, .4)
    clf = make_classifier(model, ['a', 'b'])
    for o in (model, file, vit, from_timm(vit, 'mae'), model.encoder, clf):
        got = adapt_encoder(o, (8, 12), stats=stats)
        assert got.grid == (2, 3) and got.method.mean == stats[0] and not got.decoders and got.teacher is None and 'head.weight' not in got.encoder.vit.state_dict()
        assert all(torch.equal(p, model.encoder.vit.blocks.state_dict()[n]) for n,p in got.encoder.vit.blocks.state_dict().items())


def test_a_copy_is_a_copy(model):
    before = state(model.encoder)
    got = adapt_encoder(model)
    with torch.no_grad(): [p.add_(1) for p in got.parameters()]
    assert equal(state(model.encoder), before)


@pytest.mark.parametrize('chans', [1, 4])
def test_other_channels(model, chans):
    got = adapt_encoder(model, in_chans=chans, stats=((.5,)*chans, (.5,)*chans))
    assert got.in_chans == chans and got.encoder(torch.randn(2, chans, 8, 8))[-1].shape == (2, 5, 16)
    if chans == 1: torch.testing.assert_close(got.encoder.vit.patch_embed.proj.weight, model.encoder.vit.patch_embed.proj.weight.sum(1, keepdim=True))


def test_what_cannot_be_a_source(model):
    with pytest.raises(ValueError, match='does not know its input statistics'): encoder_source(make_encoder('vit_tiny_patch16_224', depth=1))
    with pytest.raises(ValueError, match='not a plain vision transformer'): encoder_source(timm.create_model('beit_base_patch16_224', depth=1, img_size=32))
    with pytest.raises(TypeError, match='expected a MaskedAutoencoder'): encoder_source(3)
    with pytest.raises(ValueError, match='not divisible by the patch size 4'): adapt_encoder(model, 10)
    broken = mim_model('bootmae', **tiny, img_size=8, seed=0)
    with torch.no_grad(): broken.encoder.vit.blocks[0].mlp.fc1.weight[0] = float('nan')
    with pytest.raises(ValueError, match='NaN or infinity'): adapt_encoder(broken)
