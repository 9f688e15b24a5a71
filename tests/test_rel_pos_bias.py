"""The geometry of resizing the relative position bias."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_cmt import resize_rel_pos_bias
from timm_cmt.rel_pos_bias import _bicubic_weights

Grid = tuple[int, int]
REDUCTIONS = (8, 4, 2, 1)


def grids(height: int, width: int, stage: int) -> tuple[Grid, Grid]:
    """Query and key grid of a stage for an image of height x width pixels, both multiples of 32."""
    query = height // 2 ** (stage + 2), width // 2 ** (stage + 2)
    return query, (query[0] // REDUCTIONS[stage], query[1] // REDUCTIONS[stage])


def smooth(query: Grid, key: Grid) -> Tensor:
    """cos(2.5 (q_y - k_y)) * sin(1.5 q_x + 2 k_x) on cell centres in [0, 1], as a bias of one head."""

    def centres(grid: Grid) -> tuple[Tensor, Tensor]:
        y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in grid)
        return y.repeat_interleave(grid[1]), x.repeat(grid[0])

    (qy, qx), (ky, kx) = centres(query), centres(key)
    value = torch.cos(2.5 * (qy[:, None] - ky)) * torch.sin(1.5 * qx[:, None] + 2 * kx)
    return value.float()[None]


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_same_grids_give_the_bias_itself(dtype):
    bias = torch.randn(2, 35, 6, dtype=dtype)
    resized = resize_rel_pos_bias(bias, (5, 7), (2, 3), (5, 7), (2, 3))
    assert resized is bias


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(
    ("size", "bound"),
    [
        ((160, 160), 0.03),
        ((192, 192), 0.03),
        ((256, 320), 0.03),
        ((288, 288), 0.03),
        ((384, 384), 0.05),
        ((96, 96), 0.06),
    ],
)
def test_a_smooth_function_of_two_positions_stays_that_function(size, bound, stage):
    old, new = grids(224, 224, stage), grids(*size, stage)
    resized = resize_rel_pos_bias(smooth(*old), *old, *new)
    assert error(resized, smooth(*new)) < bound


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("size", [(160, 160), (256, 320), (288, 288)])
def test_interpolating_the_flattened_matrix_would_be_wrong(size, stage):
    old, new = grids(224, 224, stage), grids(*size, stage)
    expected = smooth(*new)
    as_picture = F.interpolate(
        smooth(*old)[None], size=expected.shape[1:], mode="bicubic", align_corners=False, antialias=True
    )[0]
    assert error(as_picture, expected) > 0.3


def test_constants_stay_and_heads_do_not_mix():
    bias = torch.tensor([1.0, -2.0, 0.25]).view(3, 1, 1).expand(3, 48, 12).contiguous()
    resized = resize_rel_pos_bias(bias, (6, 8), (3, 4), (11, 5), (5, 2))
    torch.testing.assert_close(resized, bias[:, :1, :1].expand(3, 55, 10))
    bias = torch.randn(3, 48, 12)
    resized = resize_rel_pos_bias(bias, (6, 8), (3, 4), (11, 5), (5, 2))
    for head in range(3):
        alone = resize_rel_pos_bias(bias[head : head + 1], (6, 8), (3, 4), (11, 5), (5, 2))
        torch.testing.assert_close(resized[head : head + 1], alone)


def test_queries_and_keys_are_resized_apart():
    query, key = torch.randn(6 * 8), torch.randn(3 * 4)
    resized = resize_rel_pos_bias((query[:, None] * key)[None], (6, 8), (3, 4), (9, 7), (5, 2))

    def alone(values: Tensor, old: Grid, new: Grid) -> Tensor:
        picture = values.view(1, 1, *old)
        return F.interpolate(picture, size=new, mode="bicubic", align_corners=False, antialias=True).flatten()

    expected = alone(query, (6, 8), (9, 7))[:, None] * alone(key, (3, 4), (5, 2))
    torch.testing.assert_close(resized[0], expected)


def test_transposed_sizes_come_out_transposed():
    # A function that treats y and x alike, on 96 x 160 and on 160 x 96, is one and the same with its axes swapped.
    (query, key), (query_t, key_t) = grids(96, 160, 0), grids(160, 96, 0)
    bias = torch.randn(2, query[0] * query[1], key[0] * key[1])

    def transpose(b: Tensor, q: Grid, k: Grid) -> Tensor:
        return b.view(-1, *q, *k).permute(0, 2, 1, 4, 3).reshape(b.shape)

    resized = resize_rel_pos_bias(bias, query, key, query_t, key_t)
    of_transposed = resize_rel_pos_bias(transpose(bias, query, key), query_t, key_t, query, key)
    torch.testing.assert_close(resized, transpose(of_transposed, query, key))
    assert resized.shape == bias.shape and error(resized, bias) > 0.5


@pytest.mark.parametrize(
    "sizes", [((64, 32), (160, 32)), ((160, 48), (96, 32)), ((64, 32), (160, 96)), ((32, 32), (96, 64))]
)
@pytest.mark.parametrize("stage", range(4))
def test_grids_of_a_single_column_are_resized_as_single_rows_are(sizes, stage):
    # torch's antialiased interpolation of a single column is wrong.
    (old, old_key), (new, new_key) = (grids(*size, stage) for size in sizes)
    bias = smooth(old, old_key)
    transposed = bias.view(1, *old, *old_key).permute(0, 2, 1, 4, 3).reshape(bias.shape)
    resized = resize_rel_pos_bias(bias, old, old_key, new, new_key)
    expected = resize_rel_pos_bias(transposed, old[::-1], old_key[::-1], new[::-1], new_key[::-1])
    expected = expected.view(1, *new[::-1], *new_key[::-1]).permute(0, 2, 1, 4, 3).reshape(resized.shape)
    torch.testing.assert_close(resized, expected)


@pytest.mark.parametrize(("size", "new_size"), [(7, 10), (10, 7), (56, 80), (56, 40), (7, 1), (3, 41), (20, 259)])
def test_the_weights_are_those_of_torch_s_antialiased_bicubic_interpolation(size, new_size):
    rows = torch.eye(size, dtype=torch.float64).reshape(1, size, 1, size)
    expected = F.interpolate(rows, size=(1, new_size), mode="bicubic", align_corners=False, antialias=True)[0, :, 0]
    torch.testing.assert_close(_bicubic_weights(size, new_size, rows), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_resized_in_float32(dtype):
    bias = torch.randn(1, 48, 12).to(dtype)
    args = (6, 8), (3, 4), (9, 7), (5, 2)
    resized = resize_rel_pos_bias(bias, *args)
    assert resized.dtype == dtype
    assert torch.equal(resized, resize_rel_pos_bias(bias.float(), *args).to(dtype))


@pytest.mark.parametrize(("old", "new"), list(itertools.permutations([(3, 4), (5, 2), (1, 1)], 2)))
def test_gradients(old, new):
    bias = torch.randn(2, 4 * old[0] * old[1], old[0] * old[1], dtype=torch.float64, requires_grad=True)
    double = [(2 * h, 2 * w) for h, w in (old, new)]
    assert torch.autograd.gradcheck(
        lambda b: resize_rel_pos_bias(b, double[0], old, double[1], new), (bias,), fast_mode=True
    )


def test_a_bias_that_does_not_lie_on_the_grids_is_refused():
    with pytest.raises(ValueError, match="48 queries and 12 keys does not lie on a query grid of 6 x 7"):
        resize_rel_pos_bias(torch.randn(1, 48, 12), (6, 7), (3, 4), (9, 7), (5, 2))
