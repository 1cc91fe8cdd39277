"""Masks: exact counts, determinism, and blocks that look like those of the sequential procedure."""
import math
import random
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bootmae_nb.masking import BlockMask, GridMask, RandomMask, block_mask, n_hidden


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


@settings(max_examples=200, deadline=None)
@given(h=st.integers(2, 20), w=st.integers(2, 20), ratio=st.floats(.05, .95), bs=st.integers(1, 5), seed=st.integers(0, 2**40),
       kind=st.sampled_from(['random', 'block', 'grid']))
def test_counts_are_exact_and_masks_deterministic(h, w, ratio, bs, seed, kind):
    try: m = dict(random=lambda: RandomMask(ratio), block=lambda: BlockMask(ratio, ratio*.8), grid=GridMask)[kind](); n = m.n_hidden((h, w))
    except ValueError as e: assert 'patches' in str(e); return
    make = lambda: m(bs, (h, w), torch.Generator().manual_seed(seed))
    mask = make()
    assert mask.shape == (bs, h*w) and mask.dtype == torch.bool
    assert (mask.sum(1) == n).all() and 0 < n < h*w
    assert torch.equal(mask, make())


def test_count_of_the_paper(): assert n_hidden(196, .75) == 147 and BlockMask().n_hidden(14) == 147


def test_masks_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    for m in (RandomMask(), BlockMask(), GridMask()): m(4, 8, torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.cuda
def test_masks_on_a_gpu():
    for m in (RandomMask(), BlockMask(), GridMask()):
        mask = m(64, 14, torch.Generator('cuda').manual_seed(0), 'cuda')
        assert mask.device.type == 'cuda' and (mask.sum(1) == m.n_hidden(14)).all()
