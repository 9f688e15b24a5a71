"""The layers that timm and torch do not have, and all that CMT knows of memory layout, kernels and recomputation."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import GELU, LayerType, get_act_layer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torchvision.ops import FrozenBatchNorm2d

from .rel_pos_bias import is_without_grad

__all__ = [
    "ActNormConv",
    "ConvNorm",
    "attend",
    "fold_norm_after",
    "make_act",
    "plain_conv",
    "refuse_other_kind",
    "run_block",
    "to_channels_last",
]


class ChannelsLastGELU(nn.GELU):
    """GELU of a map [B, C, H, W] that lies channels-last in memory, as fast as of a contiguous one.

    The CPU's fast GELU takes contiguous tensors only. Such a map is one with its axes in memory's order.
    """

    def forward(self, x: Tensor) -> Tensor:
        if _is_recorded():
            return F.gelu(x, approximate=self.approximate)
        return F.gelu(x.permute(0, 2, 3, 1), approximate=self.approximate).permute(0, 3, 1, 2)


def make_act(act_layer: LayerType) -> nn.Module:
    """An activation, of timm's or of the user's, for such maps."""
    act = get_act_layer(act_layer)()
    if type(act) in (nn.GELU, GELU):
        return ChannelsLastGELU(getattr(act, "approximate", "none"))
    return act


class ActNormConv(nn.Module):
    """Conv(Y), or Conv(Y) + Y with a shortcut, of Y = BatchNorm(GELU(X)). Stem and IRFFN consist of such units.

    Args:
        conv: The convolution. With a shortcut, it is depth-wise and keeps the size.
        act_layer: The activation, element by element.
        shortcut: Add Y.
        drop: Dropout probability after the norm.
        norm_layer: What stands for BatchNorm.

    Where `recompute` is set, eager training keeps X alone and computes Y again in the backward pass.
    """

    shortcut: torch.jit.Final[bool]
    recompute = False

    def __init__(
        self,
        conv: nn.Conv2d,
        act_layer: LayerType,
        shortcut: bool = False,
        drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.act = make_act(act_layer)
        self.norm = norm_layer(conv.in_channels, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)
        self.conv = conv
        self.shortcut = shortcut
        self.reparam_conv: nn.Conv2d | None = None  # takes the place of `conv` in a folded model
        self.register_load_state_dict_pre_hook(refuse_other_kind)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._convolve(self.norm(self.act(x)), False)
        else:
            if self.recompute and self._can_recompute(x):
                return _run_twice(self, self._compute, x)
            return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        overwrite = self._can_overwrite(x)
        y = self.act(x)
        return self._convolve(_norm_in_place(y, self.norm) if overwrite else self.norm(y), overwrite)

    def _convolve(self, y: Tensor, overwrite: bool) -> Tensor:
        y = self.drop(y)
        if self.reparam_conv is not None:
            return self.reparam_conv(y)
        out = self.conv(y)
        if self.shortcut:
            return out.add_(y) if overwrite else out + y
        return out

    def _can_recompute(self, x: Tensor) -> bool:
        """Will input and parameters be the same in the backward pass? torch.func.functional_call takes its own back."""
        is_own = all(isinstance(param, nn.Parameter) for param in self.parameters())
        return self.training and _is_eager(x) and is_own and not getattr(self.act, "inplace", False)

    def _can_overwrite(self, x: Tensor) -> bool:
        """May BatchNorm and the shortcut's sum write over what nobody else has? For the CPU, new memory is slow."""
        if not _is_eager(x) or torch.is_grad_enabled() or not x.is_cpu or x.dtype != torch.float32:
            return False
        norm, conv = self.norm, self.conv if self.reparam_conv is None else self.reparam_conv
        is_affine = type(norm) is nn.BatchNorm2d and norm.running_mean is not None and not norm.training
        is_known = is_affine and type(self.act) is ChannelsLastGELU
        return is_known and not any(map(_has_hooks, (self.act, norm, conv)))

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the shortcut and, where it can be done, the norm into the convolution, for inference.

        The norm before a padded convolution stays: it does not move the zeros of the padding.

        Raises:
            RuntimeError: What stands there cannot be folded.
        """
        if self.reparam_conv is not None:
            return
        conv = plain_conv(self.conv)
        with torch.no_grad():
            if self.shortcut:
                conv.weight[:, 0, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] += 1
            elif conv.padding == (0, 0) and conv.groups == 1:
                assert conv.bias is not None
                scale, shift = _scale_and_shift(self.norm)
                conv.bias += conv.weight.sum((2, 3)) @ shift
                conv.weight *= scale[:, None, None]
                self.norm = nn.Identity()
        self.reparam_conv = conv
        del self.conv


class ConvNorm(nn.Module):
    """A convolution, then BatchNorm.

    Args:
        in_dim: Channels of the input.
        dim: Channels of the output.
        kernel_size: Of the convolution; its stride is the same, so that its windows do not overlap.
        groups: Of the convolution.
        norm_layer: What stands for BatchNorm.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int = 1,
        groups: int = 1,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, kernel_size, stride=kernel_size, groups=groups, device=device, dtype=dtype)
        self.norm = norm_layer(dim, device=device, dtype=dtype)
        self.register_load_state_dict_pre_hook(refuse_other_kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    @torch.jit.ignore
    def fuse(self) -> nn.Conv2d:
        """One convolution that does both, for inference.

        Raises:
            RuntimeError: What stands there cannot be folded.
        """
        return fold_norm_after(plain_conv(self.conv), self.norm)


# ---- folding


def plain_conv(conv: nn.Module) -> nn.Conv2d:
    """A plain copy of a convolution, with the weight that it has now: pruned, weight-normed or parametrized or not.

    Raises:
        RuntimeError: It is another layer, such as an adapter or a quantized convolution.
    """
    if not isinstance(conv, nn.Conv2d) or (type(conv) is not nn.Conv2d and not parametrize.is_parametrized(conv)):
        raise RuntimeError(
            f"a {type(conv).__name__} cannot be reparameterized; merge adapters and reparameterize before quantizing"
        )
    with torch.no_grad():
        if not isinstance(conv.weight, nn.Parameter):  # pruning and weight norm renew it in the forward pass
            conv(conv.weight.new_zeros(1, conv.in_channels, *conv.kernel_size))
        names = "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
        geometry: dict[str, Any] = {name: getattr(conv, name) for name in names}
        plain = nn.Conv2d(conv.in_channels, conv.out_channels, **geometry).to(conv.weight)
        plain.weight.copy_(conv.weight)
        assert plain.bias is not None
        plain.bias.copy_(conv.bias) if conv.bias is not None else plain.bias.zero_()
    plain.register_load_state_dict_pre_hook(refuse_other_kind)
    return plain.train(conv.training)


def _scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a BatchNorm in evaluation, synchronised or frozen as it may be, multiplies each channel by and adds to it.

    Raises:
        RuntimeError: It is another layer, or has no running statistics.
    """
    kinds = nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d
    if not isinstance(norm, kinds) or norm.running_mean is None or norm.running_var is None:
        raise RuntimeError(
            f"a {type(norm).__name__} without running statistics cannot be reparameterized; use the model as it is"
        )
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


@torch.no_grad()
def fold_norm_after(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """`conv`, changed so that it does what it did, then `norm` in evaluation."""
    scale, shift = _scale_and_shift(norm)
    assert conv.bias is not None
    conv.weight *= scale[:, None, None, None]
    conv.bias.mul_(scale).add_(shift)
    return conv


def refuse_other_kind(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Before weights are loaded: raise where they are folded and the module is not, or the reverse.

    What both have is of the same shape, and would load without `strict` to wrong outputs.

    Raises:
        RuntimeError: The keys that begin with `prefix` are those of the other kind.
    """
    if hasattr(module, "conv") and not {f"{prefix}reparam_conv.weight", f"{prefix}weight"}.isdisjoint(state_dict):
        raise RuntimeError(
            "this checkpoint is of a reparameterized model; load it into timm.utils.reparameterize_model(model)"
        )
    if not hasattr(module, "conv") and f"{prefix}conv.weight" in state_dict:
        raise RuntimeError(
            "this model is reparameterized and the checkpoint is of a plain one; load it before you reparameterize"
        )


# ---- memory layout and kernels


def to_channels_last(x: Tensor) -> Tensor:
    """The same [B, C, H, W], channels-last in memory, by operators that vmap and every exporter know."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, dropout_p: float) -> Tensor:
    """softmax(q k^T * scale + bias) v by torch's fused kernels, where they are the better choice.

    [B, heads, N, d], [B, heads, M, d] twice, [1, heads, N, M] -> [B, heads, N, d]
    """
    # The CPU's fused kernel has no gradient of the bias. torch.func's transforms choose it all the same, and exporters
    # take it for what it is not. Compiled, the bias may be misaligned for a GPU's kernel (pytorch issue 121943).
    by_formula = (q.device.type == "cpu" or _is_recorded()) and not is_without_grad()
    # A GPU's fused kernels take heads of a multiple of 16 bytes. For others torch falls back to a slower way.
    if by_formula or (q.is_cuda and q.shape[-1] * q.element_size() % 16 != 0):
        attn = (q * scale) @ k.transpose(-2, -1) + bias
        return F.dropout(attn.softmax(dim=-1), dropout_p) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)


def _norm_in_place(y: Tensor, norm: Any) -> Tensor:
    """BatchNorm in evaluation, with the same bits, by the one function of it that can write over its input."""
    statistics = norm.weight, norm.bias, norm.running_mean, norm.running_var
    return torch.native_batch_norm(y, *statistics, False, 0.0, norm.eps, out=(y, y.new_empty(0), y.new_empty(0)))[0]


def _has_hooks(module: nn.Module) -> bool:
    # No public name tells of hooks, its own or those of all modules. Offloading tools replace `forward`.
    of_all = nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks
    return bool(module._forward_hooks or module._forward_pre_hooks or of_all or "forward" in vars(module))


def _is_recorded() -> bool:
    """Is the model traced, compiled or exported? The graph needs none of what makes the CPU faster."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def _is_eager(x: Tensor) -> bool:
    """Is x a tensor with values, computed with operator by operator?"""
    # No public name tells whether one of torch.func's transforms runs (grad, vmap, ...).
    return type(x) is Tensor and not _is_recorded() and not torch._C._are_functorch_transforms_active()


# ---- recomputation


def run_block(block: nn.Module, *inputs: Tensor, checkpointing: bool = False) -> Tensor:
    """block(*inputs), computed again in the backward pass if asked."""
    if not _is_eager(inputs[0]):
        return torch_checkpoint(block, *inputs, use_reentrant=False) if checkpointing else block(*inputs)
    # A forward pass within a backward pass is a checkpoint's second one, whoever made the checkpoint (timm's feature
    # extractors make their own). No public name tells of a backward pass.
    with _StatisticsKept(block) if torch._C._current_graph_task_id() != -1 else nullcontext():
        return _run_twice(block, block, *inputs) if checkpointing else block(*inputs)


def _run_twice(module: nn.Module, call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """call(*inputs), and again in the backward pass; the running statistics of the module's BatchNorms move once.

    torch ends the second run when it has what the backward pass needs. So a convolution at the end runs once.
    """
    return torch_checkpoint(
        call, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _StatisticsKept(module))
    )


class _StatisticsKept:
    """In this context, BatchNorms in training leave their running statistics as they are. It can be entered again."""

    def __init__(self, block: nn.Module):
        self.block = block
        self.before: list[tuple[Any, Any, Tensor]] = []

    def __enter__(self) -> None:
        norms = (m for m in self.block.modules() if m.training and getattr(m, "num_batches_tracked", None) is not None)
        norm: Any
        for norm in norms:
            self.before.append((norm, norm.momentum, norm.num_batches_tracked))
            norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()

    def __exit__(self, *error: Any) -> None:
        for norm, momentum, count in self.before:
            norm.momentum, norm.num_batches_tracked = momentum, count
        self.before.clear()
