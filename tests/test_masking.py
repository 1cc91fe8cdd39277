"""Masks: exact counts, determinism, blocks that look like those of the sequential procedure, and noise with the spectrum of its filter."""
import math
import random
import time

import numpy as np
import pytest
import torch

from bootmae_nb import masking
from bootmae_nb.masking import BlockMask, FixedMask, GridMask, NoiseMask, RandomMask, block_mask, make_mask, mask_kinds, n_hidden, noise_filter
from bootmae_nb.models import mim_model

bands = 'low', 'band', 'high', 'stop'


def sequential_blocks(H, W, n, min_area, max_area, rng):
    "One block at a time, as in the paper, until `n` patches are hidden"
    mask, hidden = np.zeros((H, W), bool), 0
    while hidden < n:
        limit = min(max_area, n - hidden)
        area, ratio = rng.uniform(min_area, limit), math.exp(rng.uniform(math.log(.3), -math.log(.3)))
        h, w = round(math.sqrt(area*ratio)), round(math.sqrt(area/ratio))
        if h >= H or w >= W: continue
        top, left = rng.randint(0, H - h), rng.randint(0, W - w)
        block = mask[top:top+h, left:left+w]
        added = int((~block).sum())
        if 0 < added <= limit: block[:] = True; hidden += added
    return mask


def boundary(masks):
    "Mean number of neighbouring patches of which one is hidden and one is not"
    m = np.asarray(masks)
    return ((m[:, 1:] != m[:, :-1]).sum((1, 2)) + (m[:, :, 1:] != m[:, :, :-1]).sum((1, 2))).mean()


@pytest.mark.parametrize('grid', [(14, 14), (10, 16)])
def test_blocks_look_like_the_sequential_ones(grid):
    L, rng = math.prod(grid), random.Random(0)
    size = round(120/196*L), 16/196*L, 60/196*L
    want = boundary([sequential_blocks(*grid, *size, rng) for _ in range(2500)])
    got = boundary(block_mask(8000, grid, *size, generator=torch.Generator().manual_seed(0)))
    assert abs(got/want - 1) < .02, (got, want)


def test_256_masks_take_at_most_60_ms():
    g, times = torch.Generator().manual_seed(0), []
    for _ in range(7):
        start = time.perf_counter(); BlockMask()(256, 14, generator=g)
        times.append(time.perf_counter() - start)
    assert min(times) < .06, times


def test_roll_shows_at_most_three_patches_of_the_blocks():
    "Before the fill 120 are hidden; of those 0 to 3 become visible, the same number in the whole batch"
    shown = set()
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        blocks = block_mask(16, (14, 14), 120, 16, 60, generator=torch.Generator().manual_seed(seed)).flatten(1)
        mask = BlockMask()(16, 14, g)
        n = (blocks & ~mask).sum(1)
        assert (n == n[0]).all()
        shown.add(int(n[0]))
    assert shown == {0, 1, 2, 3}
    blocks = block_mask(16, (14, 14), 120, 16, 60, generator=torch.Generator().manual_seed(9)).flatten(1)
    assert not (blocks & ~BlockMask(roll=0)(16, 14, torch.Generator().manual_seed(9))).any()


def test_random_masks_are_uniform():
    share = RandomMask(.75)(4000, 6, torch.Generator().manual_seed(0)).float().mean(0)
    assert (share - .75).abs().max() < .03


def test_count_of_the_paper(): assert n_hidden(196, .75) == 147 and BlockMask().n_hidden(14) == 147


def test_masks_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    for m in (RandomMask(), BlockMask(), GridMask(), *map(make_mask, mask_kinds)): m(4, 8, torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())


# noise

def naive_gain(band, s, y, x):
    "What a filter leaves of a frequency, from the definitions of the paper: G, 1 - G, G1 - G2, 1 - (G1 - G2)"
    G = lambda s: math.exp(-2*(math.pi*s)**2*(x*x + y*y))
    if band == 'low': return G(s)
    if band == 'high': return 1 - G(s)
    return G(s[0]) - G(s[1]) if band == 'band' else 1 - (G(s[0]) - G(s[1]))


@pytest.mark.parametrize('grid', [(14, 14), (5, 8), (1, 7)])
@pytest.mark.parametrize('band, s', [('low', .8), ('high', .7), ('band', (.5, 1.)), ('stop', (.6, 1.7))])
def test_filters_are_those_of_the_paper_for_every_frequency(band, s, grid):
    h, w = grid
    got = noise_filter(band, s, grid)
    want = np.array([[naive_gain(band, s, min(i, h - i)/h, j/w) for j in range(w//2 + 1)] for i in range(h)])
    want[0, 0] = 0                              # the mean moves all scores alike
    assert got.shape == want.shape and got.dtype == torch.float32
    assert np.abs(got.numpy() - want/want.max()).max() < 1e-6


@pytest.mark.parametrize('band', bands)
def test_masks_hide_the_highest_values_of_the_filtered_noise(band):
    "The whole way once more in numpy, with a full complex transform"
    m, h, w = NoiseMask(.6, band), 6, 9
    noise = torch.rand(5, h, w, generator=torch.Generator().manual_seed(3)).double().numpy()
    y, x = np.meshgrid(np.fft.fftfreq(h), np.fft.fftfreq(w), indexing='ij')
    gain = np.vectorize(lambda y, x: naive_gain(band, m.sigma, y, x))(y, x)
    score = np.fft.ifft2(np.fft.fft2(noise)*gain).real.reshape(5, -1)
    want = score >= np.sort(score, 1)[:, [-m.n_hidden((h, w))]]
    got = m(5, (h, w), torch.Generator().manual_seed(3)).numpy()
    assert (got == want).mean() > .99            # where all frequencies are nearly gone, the trace of noise may swap two patches


@pytest.mark.parametrize('grid, sigmas', [((14, 14), {}), ((6, 20), {}), ((2, 8), dict(low=5.))])
def test_noise_hides_every_patch_equally_often(grid, sigmas):
    "Also where the filter leaves one frequency: both rows of patches are equal then, and 13 of the 16 are hidden"
    for band in bands:
        m = NoiseMask(.8, band, sigmas.get(band))
        share = m(4000, grid, torch.Generator().manual_seed(0)).float().mean(0)
        assert (share - m.n_hidden(grid)/len(share)).abs().max() < .035, (band, share)


@pytest.mark.parametrize('grid', [(14, 14), (10, 16)])
def test_size_of_the_holes_follows_the_band(grid):
    "Fewer changes from patch to patch for low than for blocks, then band, chance, stop and high"
    kinds = 'low_noise', 'block', 'band_noise', 'random', 'stop_noise', 'high_noise'
    n = [boundary(make_mask(k, .75)(2000, grid, torch.Generator().manual_seed(0)).reshape(-1, *grid)) for k in kinds]
    assert all(b/a > 1.04 for a, b in zip(n, n[1:])), dict(zip(kinds, n))
    widths = [boundary(NoiseMask(band='low', sigma=o)(500, grid, torch.Generator().manual_seed(0)).reshape(-1, *grid)) for o in (.3, .6, 1.2, 2.4)]
    assert widths == sorted(widths, reverse=True) and widths[0] > 2*widths[-1]


def test_holes_keep_their_size_on_a_larger_grid():
    "Sigma counts patches: the share of neighbours that differ does not depend on the grid"
    def differ(grid):
        m = NoiseMask()(400, grid, torch.Generator().manual_seed(0)).reshape(-1, *grid)
        return (m[:, 1:] != m[:, :-1]).float().mean()
    assert abs(differ((14, 14))/differ((42, 28)) - 1) < .03


def test_noise_does_not_favour_a_direction_and_rows_differ():
    for band in bands:
        m = NoiseMask(band=band)(2000, 14, torch.Generator().manual_seed(0)).reshape(-1, 14, 14)
        down, across = (m[:, 1:] != m[:, :-1]).float().mean(), (m[:, :, 1:] != m[:, :, :-1]).float().mean()
        assert abs(down/across - 1) < .02
        assert len({tuple(o.flatten().tolist()) for o in m[:200]}) == 200


@pytest.mark.parametrize('kind', [f'{o}_noise' for o in bands])
def test_noise_masks_by_name_under_autocast(kind):
    make = lambda: make_mask(kind, .6)(4, (3, 4), torch.Generator().manual_seed(1))
    with torch.autocast('cpu', torch.bfloat16): mask = make()
    assert torch.equal(mask, make()) and mask.sum(1).tolist() == [8]*4
    model = mim_model('mae', 'vit_tiny_patch16_224', (24, 32), patch_size=8, width=48, depth=1, heads=3, pixel_width=48, pixel_depth=1, pixel_heads=3,
                      mask=kind, mask_ratio=.6, seed=0)
    assert model.method.masker == make_mask(kind, .6)
    with torch.autocast('cpu', torch.bfloat16): out = model(torch.zeros(4, 3, 24, 32), mask)
    assert out['pixels'].shape == (4, 8, 192)


@pytest.mark.parametrize('kw, says', [
    (dict(band='green'), "noise band 'green' is unknown: choose one of low, band, high, stop"),
    (dict(sigma=1.), "sigma 1.0 does not suit a 'band' filter: give two positive numbers"), (dict(sigma=(1., 1.)), 'the smaller one first'),
    (dict(sigma=(0., 1.)), 'positive'), (dict(sigma=(1., math.nan)), 'positive'), (dict(sigma=(1., math.inf)), 'positive'), (dict(sigma=(.5, 1., 2.)), 'two positive'),
    (dict(band='low', sigma=-1.), "a 'low' filter: give one positive number of patches"),
    (dict(band='high', sigma=(1., 2.)), 'one positive number'), (dict(ratio=1.2), 'outside (0, 1)')])
def test_errors_of_noise_masks(kw, says):
    with pytest.raises(ValueError) as e: NoiseMask(**kw)
    assert says in str(e.value)


def test_unknown_kind_lists_all_kinds():
    with pytest.raises(ValueError, match='choose one of block, random, grid, low_noise, band_noise, high_noise, stop_noise, or pass'): make_mask('noise')
    assert NoiseMask(sigma=[1, 2]).sigma == (1, 2) and repr(make_mask('high_noise')) == "NoiseMask(ratio=0.75, band='high', sigma=0.5)"


def test_a_filter_is_made_once(monkeypatch):
    made,own = [], masking.noise_filter
    monkeypatch.setattr(masking, 'noise_filter', lambda *args: (made.append(args), own(*args))[1])
    for sigma in (1.234, 1.234, 1.235):
        for grid in (6, (6, 6), 7): NoiseMask(band='low', sigma=sigma)(2, grid, torch.Generator().manual_seed(0))
    assert made == [('low', s, (n, n)) for s in (1.234, 1.235) for n in (6, 7)]
    m = NoiseMask(); m.sigma = [.7, 1.3]; assert m(2, 6).sum() == 54                # a list is as good as a tuple


@pytest.mark.cuda
def test_masks_on_a_gpu():
    for m in (*map(make_mask, mask_kinds), FixedMask(torch.arange(196).reshape(14, 14) > 99), FixedMask(torch.arange(196, device='cuda').reshape(14, 14) > 99)):
        mask = m(64, 14, torch.Generator('cuda').manual_seed(0), 'cuda')
        assert mask.device.type == 'cuda' and (mask.sum(1) == m.n_hidden(14)).all()
        torch.cuda.set_sync_debug_mode('error')                                 # nothing waits for the device but what is done once
        try: again = m(64, 14, torch.Generator('cuda').manual_seed(0), 'cuda')
        finally: torch.cuda.set_sync_debug_mode('default')
        assert torch.equal(mask, again)
