"""Features as colours: the same directions as scikit-learn's, in any type, with nothing to divide by; and sheets that leave the model as it was."""
import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from bootmae_nb.models import mim_model
from bootmae_nb.targets import norm_feature
from bootmae_nb.viz import feature_parts, feature_sheet, pca_basis, pca_rgb

tiny = dict(arch='vit_tiny_patch16_224', img_size=(32, 48), patch_size=8, width=48, depth=2, heads=3, seed=0)
scales = torch.tensor([6., 4, 3, 1, 1, .5, .5, .1])


def features(n=3, L=24, seed=0): return torch.randn(n, L, 8, generator=torch.Generator().manual_seed(seed))*scales


def batch(model, n=3, seed=0):
    "Images and masks for a model"
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 32, 48, generator=g)*2 - 1, model.method.masker(n, model.grid, g)


# principal components

def test_directions_and_shares_are_those_of_scikit_learn():
    x = features(); theirs = PCA(3).fit(x.flatten(0, 1).double().numpy())
    basis = pca_basis(x)
    assert np.allclose(basis.share, theirs.explained_variance_ratio_)
    assert np.allclose((basis.axes.T.numpy()*theirs.components_).sum(1)**2, 1) and np.allclose(basis.mean[0], theirs.mean_, rtol=1e-12)


def test_each_patch_stands_in_its_place():
    x = torch.zeros(2, 6, 4); x[1, 5, 0] = 1.; x[0, 1, 0] = 1.
    red = pca_rgb(x, (2, 3))[:, 0]
    assert red.argmax() == 1 and red[1, 1, 2] == red.max() and (red > .5).sum() == 2


def test_the_sign_is_fixed():
    basis = pca_basis(features())
    assert (basis.axes.gather(0, basis.axes.abs().argmax(0)[None]) > 0).all()
    assert torch.allclose(pca_basis(-features()).axes, basis.axes, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_any_type_gives_float32_colours_close_to_each_other(dtype):
    x = features().to(dtype).requires_grad_()
    res = pca_rgb(x, (4, 6))
    assert res.dtype == torch.float32 and not res.requires_grad and res.shape == (3, 3, 4, 6)
    assert (res - pca_rgb(features(), (4, 6))).abs().max() < .02


def test_ranges_ignore_a_few_odd_patches():
    x = features(4, 100); odd = x.clone(); odd[0, 0] = 50*scales
    spread = pca_rgb(odd, (10, 10))[1:].std((0, 2, 3))
    assert (spread > .1).all()
    whole = pca_rgb(odd, (10, 10), pca_basis(odd, percent=(0, 100)))[1:].std((0, 2, 3))
    assert whole[0] < .1


def test_one_odd_patch_among_equal_ones_can_be_seen():
    x = torch.ones(2, 200, 4); x[1, 7] = 3.
    res = pca_rgb(x, (10, 20))
    assert (res[1, 0].flatten() != res[0, 0, 0, 0]).nonzero().tolist() == [[7]] and (res[:, 1:] == .5).all()


@pytest.mark.parametrize('D', [1, 2, 3, 8])
def test_few_values_and_few_patches(D):
    res = pca_rgb(features(2, 4)[..., :D], (2, 2))
    assert [bool((res[:, i] == .5).all()) for i in range(3)] == [i >= D for i in range(3)]
    assert (pca_rgb(features(1, 1)[..., :D], (1, 1)) == .5).all()          # one patch has no directions


def test_rounding_of_constant_features_is_no_direction():
    x = torch.full((2, 600, 8), 1000.) + 1e-4*torch.randn(2, 600, 8, generator=torch.Generator().manual_seed(0))
    assert (pca_rgb(x, (20, 30)) == .5).all() and (pca_basis(x).share == 0).all()


def test_the_mean_of_each_place_takes_off_what_belongs_to_the_place():
    x = features(); x = x - x.mean((0, 1)); place = 20*features(1, seed=1)
    assert torch.allclose(pca_rgb(x + place, (4, 6), per_place=True), pca_rgb(x, (4, 6), per_place=True), atol=1e-4)
    assert (pca_rgb(x + place, (4, 6)) - pca_rgb(x, (4, 6))).abs().mean() > .1
    basis = pca_basis(x + place, per_place=True)
    assert torch.equal(pca_rgb((x + place)[1:2], (4, 6), basis)[0], pca_rgb(x + place, (4, 6), per_place=True)[1])
    with pytest.raises(ValueError, match='a basis for 24 places and 8 values does not fit'): pca_rgb(features(2, 6), (2, 3), basis)


def test_two_maps_share_colours_only_through_a_basis():
    a, b = features(1), features(1, seed=2) + 5
    basis = pca_basis(a)
    assert torch.equal(pca_rgb(torch.cat([a, b]), (4, 6), basis)[1:], pca_rgb(b, (4, 6), basis))
    assert not torch.allclose(pca_rgb(b, (4, 6), basis), pca_rgb(b, (4, 6)), atol=.1)


def test_what_has_no_colours():
    with pytest.raises(ValueError, match='NaN'): pca_rgb(torch.full((1, 4, 3), float('nan')), 2)
    with pytest.raises(ValueError, match=r'give \(B, L, D\)'): pca_rgb(torch.rand(4, 3), 2)
    with pytest.raises(ValueError, match=r'shape \(1, 5, 3\) do not fit a grid of 2 x 2'): pca_rgb(torch.rand(1, 5, 3), 2)


# sheets

@pytest.mark.parametrize('name', ['bootmae', 'dbot'])
def test_a_sheet_is_drawn_in_eval_and_leaves_the_model_as_it_was(name):
    model = mim_model(name, drop_path=.5, **tiny).train()
    x, mask = batch(model)
    with torch.no_grad(): given = model.eval()(x, mask)['features']
    model.train()
    before = {k: v.clone() for k,v in model.state_dict().items()}
    sheet = feature_sheet(model, x, mask, height=64)
    assert model.training and model.decoders.training and not model.teacher.training
    assert np.array_equal(sheet, feature_sheet(model, x, mask, given, height=64))
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
    with pytest.raises(ValueError, match='does not fit'): feature_sheet(model, x, mask[:2])
    assert model.training
    feature_sheet(model.eval(), x, mask); assert not model.training


def test_the_prediction_goes_through_the_norm_of_the_loss():
    "BootMAE's is normalised as its target is, so its scale does not matter; dBOT's is not"
    for name, same in ('bootmae', True), ('dbot', False):
        model = mim_model(name, **tiny).eval()
        x, mask = batch(model)
        with torch.no_grad(): given = model(x, mask)['features']
        a, b = (feature_parts(model, x, mask, f*given)['predicted (rest faded)'] for f in (1, 30))
        assert torch.allclose(a, b, atol=1e-2) == same


@pytest.mark.parametrize('name', ['bootmae', 'dbot'])
@pytest.mark.parametrize('per_place', [False, True])
def test_colours_are_fitted_to_the_normalised_target_alone(name, per_place):
    model = mim_model(name, **tiny).eval()
    x, mask = batch(model)
    with torch.no_grad(): given = model(x, mask)['features']
    _, _, teacher, predicted = feature_parts(model, x, mask, per_place=per_place).values()
    cls = int(name == 'dbot')
    targ = norm_feature(model.teacher_features(x), model.method.norm_features)[:, cls:]
    pasted = targ.clone(); pasted[mask] = (norm_feature(given) if name == 'bootmae' else given[:, 1:]).flatten(0, 1)
    basis = pca_basis(targ, per_place)
    a, b = (pca_rgb(o, model.grid, basis) for o in (targ, pasted))
    assert torch.equal(teacher[..., ::8, ::8], a) and torch.equal(teacher[..., 7::8, 7::8], a)
    hidden = mask.reshape(3, 1, 4, 6).expand_as(b)
    assert torch.allclose(predicted[..., ::8, ::8][hidden], b[hidden]) and torch.allclose(predicted[..., ::8, ::8][~hidden], .75 + a[~hidden]/4)


def test_one_channel_titles_and_sizes():
    model = mim_model('bootmae', in_chans=1, **tiny)
    x = torch.rand(2, 1, 32, 48); mask = batch(model, 2)[1]
    parts = feature_parts(model, x, mask)
    assert list(parts) == ['image', 'masked input', 'teacher', 'predicted (rest faded)'] and {o.shape[2:] for o in parts.values()} == {(32, 48)}
    assert 'teacher less place mean' in feature_parts(model, x, mask, per_place=True)
    assert feature_sheet(model, x, mask, height=64).height == 22 + 6 + 2*70
