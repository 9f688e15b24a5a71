"""The relative position bias B of CMT, and its bicubic resizing to any input size ("B' = Bicubic(B)", section 3.1).

B is one learnt number for each head, query position and key position: a function of two positions in the image. It is
resized as one, over the query grid and over the key grid. Its matrix form [queries, keys] is no picture: neighbouring
rows of it may lie at opposite edges of the image.
"""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RelPosBias", "resize_rel_pos_bias"]

_logger = logging.getLogger(__name__)

# Older resized biases are dropped once those of one stage take more than this; the newest is always kept.
_MAX_RESIZED_BYTES = 64 * 2**20


def resize_rel_pos_bias(
    bias: Tensor,
    query_grid: tuple[int, int],
    key_grid: tuple[int, int],
    new_query_grid: tuple[int, int],
    new_key_grid: tuple[int, int],
) -> Tensor:
    """Resize a relative position bias: bicubic over the query grid, then over the key grid.

    [heads, Hq * Wq, Hk * Wk] -> [heads, Hq' * Wq', Hk' * Wk'], tokens in row-major order. Differentiable, pure.
    Computed in float32 (float64 stays float64) and returned in the dtype of `bias`; on equal grids, `bias` itself.

    Args:
        bias: The bias of one stage.
        query_grid: (height, width) in tokens of the grid that the queries lie on.
        key_grid: (height, width) in tokens of the reduced grid that the keys lie on.
        new_query_grid: The query grid to resize to.
        new_key_grid: The key grid to resize to.

    Raises:
        ValueError: `bias` does not have the shape that the grids say.
    """
    queries, keys = bias.shape[1:]
    if queries != query_grid[0] * query_grid[1] or keys != key_grid[0] * key_grid[1]:
        raise ValueError(
            f"a bias of {queries} queries and {keys} keys does not lie on a query grid of "
            f"{query_grid[0]} x {query_grid[1]} and a key grid of {key_grid[0]} x {key_grid[1]} tokens; "
            f"pass the grids that it was made for"
        )
    if query_grid == new_query_grid and key_grid == new_key_grid:
        return bias
    grid = [query_grid[0], query_grid[1], key_grid[0], key_grid[1]]
    new_grid = [new_query_grid[0], new_query_grid[1], new_key_grid[0], new_key_grid[1]]
    if not torch.jit.is_scripting():  # which knows no such question
        if bias.device.type != "meta" and torch.is_autocast_enabled(bias.device.type):  # there is none on "meta"
            with torch.autocast(bias.device.type, enabled=False):
                return _resize_axes(bias, grid, new_grid)
    return _resize_axes(bias, grid, new_grid)


def _resize_axes(bias: Tensor, grid: list[int], new_grid: list[int]) -> Tensor:
    out = bias.to(torch.promote_types(bias.dtype, torch.float32)).reshape([bias.shape[0]] + grid)
    for i, size in enumerate(new_grid):
        # The last axis comes last, whose product needs no copy to be contiguous: the others are small until then.
        out = (out.transpose(i + 1, -1) @ _bicubic_weights(out.shape[i + 1], size, out)).transpose(i + 1, -1)
    return out.flatten(3).flatten(1, 2).to(bias.dtype)


def _bicubic_weights(size: int, new_size: int, like: Tensor) -> Tensor:
    """What each of `size` positions of an axis contributes to each of `new_size`: [size, new_size].

    The interpolation of torch, of unit vectors. Applied as a product, since that has a gradient where torch's own
    interpolation has none (``torch.compile`` with symbolic sizes) or one that differs from run to run (CUDA).
    """
    rows = torch.eye(size, dtype=like.dtype, device=like.device).reshape(1, size, 1, size)
    # As rows: antialiased, torch (2.6 to 2.14 at least) interpolates single columns wrongly.
    return F.interpolate(rows, size=(1, new_size), mode="bicubic", align_corners=False, antialias=True)[0, :, 0]


class RelPosBias(nn.Module):
    """The bias B of eq. 3, one parameter shared by the blocks of a stage, at any size of the stage's feature map.

    The shape of B does not tell its grid (96 x 160 and 160 x 96 pixels give the same one), so the query grid is saved
    beside it. The key grid follows from it.

    Args:
        num_heads: Attention heads of the stage.
        query_size: (height, width) of the stage's feature map in tokens, at the size the model is built for.
        sr_ratio: Reduction k of the key grid, on each side.
    """

    __jit_ignored_attributes__ = ["_resized"]  # TorchScript resizes in every call

    def __init__(self, num_heads: int, query_size: tuple[int, int], sr_ratio: int = 1, device=None, dtype=None):
        super().__init__()
        self.sr_ratio = sr_ratio
        self.query_size = query_size
        key_size = self.key_size(query_size)
        # Not named "bias": the authors decay it with the other weights, and timm exempts what is called a bias.
        self.weight = nn.Parameter(
            torch.empty(num_heads, query_size[0] * query_size[1], key_size[0] * key_size[1], device=device, dtype=dtype)
        )
        self.register_buffer("query_grid", torch.empty(2, device=device, dtype=torch.int64))
        # The weight and what was resized from it. Replaced as a whole, never edited, since threads share it.
        self._resized: tuple[Tensor, int, dict[tuple[int, int], Tensor]] | None = None
        self.register_load_state_dict_pre_hook(_resize_checkpoint)
        self.register_state_dict_pre_hook(_renew_query_grid)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """B ~ N(0, 1), as the authors initialise it."""
        nn.init.normal_(self.weight)
        self.query_grid.copy_(torch.tensor(self.query_size))

    def key_size(self, query_size: tuple[int, int]) -> tuple[int, int]:
        """The grid that a convolution of kernel and stride `sr_ratio` makes of a grid of queries."""
        return query_size[0] // self.sr_ratio, query_size[1] // self.sr_ratio

    def set_query_size(self, query_size: tuple[int, int]) -> None:
        """Resize B for good; the parameter is replaced where the size changes."""
        if query_size == self.query_size:
            return
        weight = self._resize(self.weight.detach(), query_size[0], query_size[1])
        self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        self.query_size = query_size
        self._resized = None
        _renew_query_grid(self)

    def train(self, mode: bool = True) -> "RelPosBias":
        """Entering training also drops what has been resized: FSDP's writes go unseen (see `_is_unchanged`)."""
        if mode:
            self._resized = None
        return super().train(mode)

    def forward(self, height: int, width: int) -> Tensor:
        """-> [heads, height * width, keys], for a feature map of `height` x `width` tokens."""
        weight = self.weight
        if not torch.jit.is_scripting() and not torch.jit.is_tracing() and not torch.is_grad_enabled():
            weight = weight.detach()  # torch's FLOP counter cannot follow, without grad, a module's own parameter
        if height == self.query_size[0] and width == self.query_size[1]:
            return weight
        if torch.jit.is_scripting():
            return self._resize(weight, height, width)
        return self._remembered(weight, height, width)

    def _resize(self, weight: Tensor, height: int, width: int) -> Tensor:
        k = self.sr_ratio
        H, W = self.query_size
        return resize_rel_pos_bias(weight, (H, W), (H // k, W // k), (height, width), (height // k, width // k))

    @torch.jit.unused
    def _remembered(self, weight: Tensor, height: int, width: int) -> Tensor:
        """`_resize`, computed once per size for as long as the weight stays what it was."""
        if torch.jit.is_tracing():
            height, width = int(height), int(width)  # a trace is of one size
            if not torch.onnx.is_in_onnx_export() or self.training:
                return self._resize(weight, height, width)
            # Into ONNX goes, as a constant, what has been resized before, with no interpolation.
            weight = weight.detach()
        if weight.requires_grad or torch.compiler.is_compiling() or not is_plain_tensor(weight):
            return self._resize(weight, height, width)
        size, held = (height, width), self._resized
        with torch.inference_mode(False), torch.no_grad():  # training may use what is kept, so no inference tensors
            if held is None or not _is_unchanged(weight, held[0], held[1]):
                held = (_snapshot(weight), _version(weight), {})
            seen, version, resized = held
            if size in resized:
                return resized[size]
            bias = self._resize(weight, height, width)
        kept, room = [(size, bias)], _MAX_RESIZED_BYTES - bias.nbytes
        for other in reversed(resized):  # newest first
            room -= resized[other].nbytes
            if room < 0:
                break
            kept.append((other, resized[other]))
        self._resized = (seen, version, dict(reversed(kept)))
        return bias

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__, _resized=None)  # copies and pickles carry the weight alone

    def find_query_size(self, weight: Tensor, query_grid: Tensor | None, name: str) -> tuple[int, int]:
        """The query grid that a checkpoint's bias lies on.

        Args:
            weight: The checkpoint's bias.
            query_grid: The grid recorded with it; None in layouts that record none, which are square.
            name: The bias's key, for the error.

        Raises:
            RuntimeError: The bias is not one of this stage, or its grid cannot be told.
        """
        heads = self.weight.shape[0]
        if weight.ndim != 3 or weight.shape[0] != heads:
            raise RuntimeError(f"{name} has the shape {tuple(weight.shape)}; this stage needs ({heads}, queries, keys)")
        queries, keys = weight.shape[1:]
        if query_grid is None:
            side = round(queries**0.5)
            if side * side != queries:
                raise RuntimeError(
                    f"{name} has {queries} queries, which is no square, and the checkpoint does not say on which grid "
                    f"they lie; add the key {name.rpartition('.')[0]}.query_grid = torch.tensor([height, width]) to it"
                )
            size = (side, side)
        else:
            size = (round(float(query_grid[0])), round(float(query_grid[1])))  # averaged checkpoints hold floats
        key_size = self.key_size(size)
        if size[0] * size[1] != queries or key_size[0] * key_size[1] != keys:
            raise RuntimeError(
                f"{name} has {queries} queries and {keys} keys, but a query grid of {size[0]} x {size[1]} tokens "
                f"reduced by {self.sr_ratio} has {size[0] * size[1]} and {key_size[0] * key_size[1]}; "
                f"the checkpoint was not made by this network, or was edited"
            )
        return size

    def resize_in(self, state_dict: dict[str, Any], prefix: str) -> tuple[int, int] | None:
        """Bring the bias in a state dict to this module's grid; returns the grid it had, None if there is no bias."""
        weight = state_dict.get(f"{prefix}weight")
        if weight is None:
            state_dict.pop(f"{prefix}query_grid", None)  # says nothing without its bias
            return None
        size = self.find_query_size(weight, state_dict.get(f"{prefix}query_grid"), f"{prefix}weight")
        k = self.sr_ratio
        H, W = self.query_size
        state_dict[f"{prefix}weight"] = resize_rel_pos_bias(weight, size, self.key_size(size), (H, W), (H // k, W // k))
        state_dict[f"{prefix}query_grid"] = torch.tensor(self.query_size)
        return size

    def extra_repr(self) -> str:
        heads, queries, keys = self.weight.shape
        return f"heads={heads}, query_size={self.query_size}, key_size={self.key_size(self.query_size)}"


def _renew_query_grid(module: RelPosBias, *_: Any) -> None:
    # Before a state dict is taken: averages of weights (timm's ModelEma and ModelEmaV2) round integers down.
    module.query_grid = module.query_grid.new_tensor(module.query_size)


def _resize_checkpoint(module: RelPosBias, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    # The model's own hook has resized before, and refused what does not fit before anything was copied. This is for
    # stages that timm takes out of the model (features_only); what is refused here comes after the stem was copied.
    size = module.resize_in(state_dict, prefix)
    if size is not None and size != module.query_size:
        _logger.info("Resized %sweight from a grid of %s to one of %s tokens", prefix, size, module.query_size)


def is_plain_tensor(x: Any) -> bool:
    """A tensor whose values can be read: no fake, distributed or dual one, no proxy of FX, nothing under torch.func."""
    if type(x) not in (Tensor, nn.Parameter) or x.device.type == "meta":
        return False
    if torch._C._are_functorch_transforms_active():  # vmap, grad and the like; no public name tells
        return False
    return torch.autograd.forward_ad.unpack_dual(x).tangent is None


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _snapshot(weight: Tensor) -> Tensor:
    # The alias keeps an accelerator's memory from being given to another tensor, whose address would look the same.
    return weight.clone() if weight.device.type == "cpu" else weight.detach()


def _is_unchanged(weight: Tensor, seen: Tensor, version: int) -> bool:
    """Is `weight` still what was `seen`?

    On the CPU the values are compared, which misses nothing and takes microseconds. On an accelerator that would make
    the host wait, so autograd's version counter decides; it sees every edit but those in place through ``.data``, and
    FSDP's gathering, which `train` is there for.
    """
    if weight.dtype != seen.dtype or weight.device != seen.device or weight.shape != seen.shape:
        return False
    if weight.device.type == "cpu":
        return torch.equal(weight, seen)
    return weight.data_ptr() == seen.data_ptr() and _version(weight) == version
