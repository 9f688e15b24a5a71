"""The relative position bias B of CMT, and its bicubic resizing to any input size ("B' = Bicubic(B)", section 3.1).

B is one learnt number for each head, query position and key position: a function of two positions in the image. It is
resized as one, over the query grid and over the key grid. Its matrix form [queries, keys] is no picture: neighbouring
rows of it may lie at opposite edges of the image.
"""

import logging
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RelPosBias", "is_without_grad", "resize_rel_pos_bias"]

_logger = logging.getLogger(__name__)


def is_without_grad() -> bool:
    """Are there no gradients? Never in a trace, whose check runs without them and wants the same operators."""
    return not torch.is_grad_enabled() and not torch.jit.is_tracing()


@torch.fx.wrap  # whether it resizes depends on the sizes, which FX cannot follow
def resize_rel_pos_bias(
    bias: Tensor,
    query_grid: tuple[int, int],
    key_grid: tuple[int, int],
    new_query_grid: tuple[int, int],
    new_key_grid: tuple[int, int],
) -> Tensor:
    """Resize a relative position bias: bicubic over the query grid, then over the key grid.

    [heads, Hq * Wq, Hk * Wk] -> [heads, Hq' * Wq', Hk' * Wk'], tokens in row-major order. Differentiable, pure.
    Computed in float32 (float64 stays float64) and returned in the dtype of `bias`; on equal grids, `bias` as it is.

    Args:
        bias: The bias of one stage.
        query_grid: (height, width) in tokens of the grid that the queries lie on.
        key_grid: (height, width) in tokens of the reduced grid that the keys lie on.
        new_query_grid: The query grid to resize to.
        new_key_grid: The key grid to resize to.

    Raises:
        ValueError: `bias` does not have the shape that the grids say.
    """
    grid = [query_grid[0], query_grid[1], key_grid[0], key_grid[1]]
    new_grid = [new_query_grid[0], new_query_grid[1], new_key_grid[0], new_key_grid[1]]
    if bias.shape[1] != grid[0] * grid[1] or bias.shape[2] != grid[2] * grid[3]:
        raise ValueError(
            f"a bias of {bias.shape[1]} queries and {bias.shape[2]} keys does not lie on a query grid of "
            f"{grid[0]} x {grid[1]} and a key grid of {grid[2]} x {grid[3]} tokens; pass the grids it was made for"
        )
    if torch.jit.is_scripting():
        return bias if grid == new_grid else _resize_axes(bias, grid, new_grid)
    else:  # TorchScript compiles what follows an if, and knows neither torch.SymInt nor autocast by name
        if not any(isinstance(side, torch.SymInt) for side in new_grid) and grid == new_grid:
            return bias
        with _full_precision(bias.device.type):
            return _resize_axes(bias, grid, new_grid)


def _full_precision(device: str) -> AbstractContextManager[Any]:
    is_autocast = device != "meta" and torch.is_autocast_enabled(device)  # there is none on "meta"
    return torch.autocast(device, enabled=False) if is_autocast else nullcontext()


def _resize_axes(bias: Tensor, grid: list[int], new_grid: list[int]) -> Tensor:
    out = bias.to(torch.promote_types(bias.dtype, torch.float32)).reshape([bias.shape[0]] + grid)
    for size, new_size in zip(grid, new_grid):  # the first axis becomes the last: four such turns put all back
        out = out.movedim(1, -1) @ _bicubic_weights(size, new_size, out)
    return out.flatten(3).flatten(1, 2).to(bias.dtype)


def _bicubic_weights(size: int, new_size: int, like: Tensor) -> Tensor:
    """What each of `size` positions of an axis contributes to each of `new_size`: [size, new_size].

    The weights of torch's antialiased bicubic interpolation. Written out, since torch's own operator cannot be exported
    to ONNX, has no gradient where sizes are symbolic, and interpolates single columns wrongly.
    """
    position = torch.arange(size, dtype=like.dtype, device=like.device) + 0.5
    new_position = torch.arange(new_size, dtype=like.dtype, device=like.device) + 0.5
    scale = torch.full((), size, dtype=like.dtype, device=like.device) / new_size  # no number: sizes may be symbolic
    x = ((position[:, None] - new_position * scale) / scale.clamp(min=1)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2  # Keys' kernel, a = -0.5
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return weights / weights.sum(dim=0)


class RelPosBias(nn.Module):
    """The bias B of eq. 3, one parameter shared by the blocks of a stage, at any size of the stage's feature map.

    The shape of B does not tell its grid (96 x 160 and 160 x 96 pixels give the same one), so the query grid is saved
    beside it. The key grid follows from it.

    Args:
        num_heads: Attention heads of the stage.
        query_size: (height, width) of the stage's feature map in tokens, at the size the model is built for.
        sr_ratio: Reduction k of the key grid, on each side.
    """

    query_grid: Tensor

    def __init__(self, num_heads: int, query_size: tuple[int, int], sr_ratio: int = 1, device=None, dtype=None):
        super().__init__()
        self.sr_ratio = sr_ratio
        self.query_size = query_size
        queries, keys = math.prod(query_size), math.prod(self.key_size(query_size))
        # Not named "bias": the authors decay it with the other weights, and timm exempts what is called a bias.
        self.weight = nn.Parameter(torch.empty(num_heads, queries, keys, device=device, dtype=dtype))
        self.register_buffer("query_grid", torch.empty(2, device=device, dtype=torch.int64))
        self.register_load_state_dict_pre_hook(_resize_checkpoint)
        self.register_state_dict_post_hook(_write_query_grid)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """B ~ N(0, 1), as the authors initialise it."""
        nn.init.normal_(self.weight)
        self.query_grid.copy_(self.query_grid.new_tensor(self.query_size))

    def key_size(self, query_size: tuple[int, int]) -> tuple[int, int]:
        """The grid that a convolution of kernel and stride `sr_ratio` makes of a grid of queries."""
        return query_size[0] // self.sr_ratio, query_size[1] // self.sr_ratio

    def set_query_size(self, query_size: tuple[int, int]) -> None:
        """Resize B for good; the parameter is replaced where the size changes.

        Raises:
            RuntimeError: B is no parameter, but computed from some.
        """
        if query_size == self.query_size:
            return
        if not isinstance(self.weight, nn.Parameter):
            raise RuntimeError(
                "a pruned or parametrized position bias cannot be resized; make that permanent first, by "
                "torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations"
            )
        weight = self._resize(self.weight.detach(), self.query_size, query_size)
        self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        self.query_size = query_size
        self.query_grid = self.query_grid.new_tensor(query_size)

    def forward(self, height: int, width: int) -> Tensor:
        """-> [1, heads, height * width, keys], for a feature map of `height` x `width` tokens."""
        weight: Tensor = self.weight
        if is_without_grad():
            # SDPA takes its slow way for a mask that wants gradients, even where there are none, and torch's FLOP
            # counter cannot follow a module that returns its own parameter.
            weight = weight.detach()
        # SDPA's CPU kernel accepts only 4-D masks
        return self._resize(weight, self.query_size, (height, width)).unsqueeze(0)

    def _resize(self, weight: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
        return resize_rel_pos_bias(weight, old, self.key_size(old), new, self.key_size(new))

    def find_query_size(self, weight: Tensor, query_grid: Tensor | None, name: str) -> tuple[int, int]:
        """The query grid that a checkpoint's bias lies on.

        Args:
            weight: The checkpoint's bias.
            query_grid: The grid recorded with it; None in layouts that record none.
            name: The bias's key, for messages.

        Raises:
            RuntimeError: The bias is not one of this stage, or its grid cannot be told.
        """
        heads = self.weight.shape[0]
        if weight.ndim != 3 or weight.shape[0] != heads:
            raise RuntimeError(f"{name} has the shape {tuple(weight.shape)}; this stage needs ({heads}, queries, keys)")
        queries, keys = weight.shape[1:]
        grids = [(h, queries // h) for h in range(1, queries + 1) if queries % h == 0]
        grids = [grid for grid in grids if math.prod(self.key_size(grid)) == keys]
        if query_grid is not None and not query_grid.is_meta:
            height, width = (float(side) for side in query_grid)
            # A bfloat16 holds no more than 8 bits of a side. The nearest grid first, since 257 x 256 is near 256 x 257,
            # and the model's own of two that are as near.
            for h, w in sorted(grids, key=lambda g: (abs(g[0] - height) + abs(g[1] - width), g != self.query_size)):
                if abs(h - height) <= h / 256 and abs(w - width) <= w / 256:
                    return h, w
            raise RuntimeError(
                f"{name} has {queries} queries and {keys} keys, which do not lie on the query grid of {height:g} x "
                f"{width:g} tokens, reduced by {self.sr_ratio}, that is recorded beside it; the checkpoint was not "
                f"made by this network, or was edited"
            )
        if weight.shape == self.weight.shape:
            return self.query_size
        side = math.isqrt(queries)
        if (side, side) in grids:
            _logger.info("%s has no grid beside it; taken for the square of %d x %d tokens", name, side, side)
            return side, side
        raise RuntimeError(
            f"{name} has {queries} queries and {keys} keys, which is no square grid, and the checkpoint does not say "
            f"on which grid they lie; add {name.removesuffix('weight')}query_grid = torch.tensor([height, width]) to it"
        )

    def resize_in(self, state_dict: dict[str, Any], prefix: str) -> tuple[int, int] | None:
        """Bring the bias in a state dict to this module's grid; returns the grid it had, None if there is no bias."""
        name, grid_name = f"{prefix}weight", f"{prefix}query_grid"
        weight, grid = state_dict.get(name), state_dict.get(grid_name)
        if weight is None and grid is None:
            return None
        # A grid without its bias is not used: the model keeps its own bias, and so its own grid.
        device = self.query_grid.device if weight is None else weight.device
        state_dict[grid_name] = torch.tensor(self.query_size, device=device)
        if weight is None:
            return None
        size = self.find_query_size(weight, grid, name)
        state_dict[name] = self._resize(weight, size, self.query_size)
        return size

    def extra_repr(self) -> str:
        return f"heads={self.weight.shape[0]}, query_size={self.query_size}, key_size={self.key_size(self.query_size)}"


def _write_query_grid(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    # Averages of weights (timm's ModelEma and ModelEmaV2) round the integers of the buffer down.
    assert isinstance(module, RelPosBias)
    state_dict[f"{prefix}query_grid"] = module.query_grid.new_tensor(module.query_size)


def _resize_checkpoint(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    # The model's own hook has resized before, and refused what does not fit before anything was copied. This is for
    # stages that others take out of the model.
    assert isinstance(module, RelPosBias)
    size = module.resize_in(state_dict, prefix)
    if size is not None and size != module.query_size:
        _logger.info("Resized %sweight from a grid of %s to one of %s tokens", prefix, size, module.query_size)
