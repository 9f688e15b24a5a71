"""GELU, BatchNorm and convolution as one step: in place in inference, from fewer saved activations in training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Neither these nor a module's own hooks have a public name.
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from .rel_pos_bias import is_plain_tensor

_GLOBAL_HOOKS = _global_forward_hooks, _global_forward_pre_hooks, _global_backward_hooks, _global_backward_pre_hooks

__all__ = [
    "ChannelsLastGELU",
    "can_fuse",
    "conv_in_float32",
    "gelu_norm_conv",
    "statistics_kept",
    "to_channels_last",
]


class ChannelsLastGELU(nn.GELU):
    """GELU of maps, [B, C, H, W], that lie channels-last in memory."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
                return F.gelu(x)  # such graphs need no transposes
        return _gelu(x)


def to_channels_last(x: Tensor) -> Tensor:
    """The same [B, C, H, W], channels-last in memory, by operators that vmap and every exporter know."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _gelu(x: Tensor) -> Tensor:
    # The CPU's fast GELU, oneDNN's, takes contiguous tensors alone; what else it has needs two to three times as long.
    return F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Run the BatchNorms in a module without a mark on their running statistics, for a forward pass done over."""
    norms = [m for m in module.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count


def can_fuse(
    x: Tensor,
    convs: tuple[nn.Module, ...],
    acts: tuple[nn.Module, ...],
    norms: tuple[nn.Module, ...],
    drops: tuple[nn.Module, ...] = (),
    recompute: bool = False,
) -> bool:
    """Can `gelu_norm_conv` stand in for these modules? x is what the first of the convolutions has made.

    Without gradients on the CPU, where new memory costs more than GELU or BatchNorm; with them if `recompute`. Never
    for what has replaced them (adapters, SyncBatchNorm), or where hooks want to be called.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not is_plain_tensor(x):
        return False
    grad = torch.is_grad_enabled()
    if grad and not recompute:
        return False
    if not grad and x.device.type != "cpu":
        return False
    for norm in norms:
        if type(norm) is nn.BatchNorm2d:
            tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var
            if not all(map(is_plain_tensor, tensors)) or (norm.training and not (grad and norm.track_running_stats)):
                return False
        elif grad or type(norm) is not nn.Identity:  # which is there where it has been folded
            return False
    return (
        all(type(conv) is nn.Conv2d and conv.padding_mode == "zeros" for conv in convs)
        and not any(isinstance(conv.padding, str) for conv in convs)  # "same"
        and all(is_plain_tensor(tensor) for conv in convs for tensor in (conv.weight, conv.bias))
        and all(type(act) is ChannelsLastGELU for act in acts)
        and all(type(drop) is nn.Dropout and not (drop.training and drop.p > 0) for drop in drops)
        and not any(_GLOBAL_HOOKS)
        and not any(map(_wants_a_call, (*convs, *acts, *norms, *drops)))
    )


def _wants_a_call(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in module.__dict__  # as offloading replaces it


def gelu_norm_conv(x: Tensor, norm: nn.Module, conv: nn.Conv2d, shortcut: bool = False) -> Tensor:
    """conv(y), or conv(y) + y with `shortcut`, of y = norm(gelu(x)).

    Without gradients y overwrites x. With them x alone is kept for the backward pass, which computes y anew; the
    running statistics are updated as `norm` would. The gradients are those of the modules, to rounding; there are no
    second ones.
    """
    if not torch.is_grad_enabled():
        return _infer(x, norm, conv, shortcut)
    momentum = norm.momentum
    if norm.training and norm.num_batches_tracked is not None:  # as `statistics_kept` leaves it
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # a cumulative average
            momentum = 1.0 / float(norm.num_batches_tracked)
    return _GeluNormConv.apply(
        x,
        norm.weight,
        norm.bias,
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,
        norm.training,
        momentum or 0.0,  # of a cumulative average, in evaluation
        norm.eps,
        (conv.stride, conv.padding, conv.dilation, conv.groups),
        shortcut,
    )


def _infer(x: Tensor, norm: nn.Module, conv: nn.Conv2d, shortcut: bool) -> Tensor:
    torch.ops.aten.gelu_(x.permute(0, 2, 3, 1))
    if isinstance(norm, nn.BatchNorm2d):  # else it has been folded
        statistics = norm.running_mean, norm.running_var
        unused = norm.running_mean.new_empty(0)
        torch.ops.aten.native_batch_norm.out(
            x, norm.weight, norm.bias, *statistics, False, 0.0, norm.eps, out=x, save_mean=unused, save_invstd=unused
        )
    out = conv(x)
    return out.add_(x) if shortcut else out


class _GeluNormConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        batch_statistics: bool,
        momentum: float,
        eps: float,
        geometry: tuple[Any, ...],
        shortcut: bool,
    ) -> Tensor:
        y, mean, invstd = torch.native_batch_norm(
            _gelu(x), norm_weight, norm_bias, running_mean, running_var, batch_statistics, momentum, eps
        )
        if not batch_statistics:
            mean, invstd = running_mean.clone(), (running_var + eps).rsqrt()
        ctx.save_for_backward(x, norm_weight, norm_bias, conv_weight, mean, invstd)
        ctx.batch_statistics, ctx.eps, ctx.geometry, ctx.shortcut = batch_statistics, eps, geometry, shortcut
        # Cast by hand: what autocast casts here, without gradients, it would keep for later uses that want one.
        out = F.conv2d(y, conv_weight.to(y.dtype), conv_bias.to(y.dtype), *geometry)
        return out.add_(y) if shortcut else out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, conv_weight, mean, invstd = ctx.saved_tensors
        activated = _gelu(x)
        variance = invstd.square().reciprocal()
        y = F.batch_norm(activated, mean, variance, norm_weight, norm_bias, training=False, eps=0.0)
        grad_y, grad_conv_weight, grad_conv_bias = _convolution_backward(
            grad_out.to(x.dtype),  # under autocast in another precision than the parameters
            y,
            conv_weight.to(x.dtype),
            ctx.geometry,
        )
        del y
        if ctx.shortcut:
            grad_y += grad_out
        grad_x, grad_norm_weight, grad_norm_bias = torch.ops.aten.native_batch_norm_backward(
            grad_y,
            activated,
            norm_weight,
            mean,
            variance - ctx.eps,
            mean,
            invstd,
            ctx.batch_statistics,
            ctx.eps,
            [True, True, True],
        )
        del activated, grad_y
        grad = grad_x.permute(0, 2, 3, 1)
        torch.ops.aten.gelu_backward.grad_input(grad, x.permute(0, 2, 3, 1), grad_input=grad)
        return (
            grad_x,
            grad_norm_weight,
            grad_norm_bias,
            grad_conv_weight.to(conv_weight.dtype),
            grad_conv_bias.to(conv_weight.dtype),
            *[None] * 7,
        )


def conv_in_float32(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """conv(x) in float32, forward and backward, whatever the precision of x, which is kept and returned as it is."""
    return _Float32Conv.apply(x, conv.weight, conv.bias, (conv.stride, conv.padding, conv.dilation, conv.groups))


class _Float32Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, geometry: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return F.conv2d(x.float(), weight.float(), bias.float(), *geometry).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grads = _convolution_backward(grad_out.float(), x.float(), weight.float(), ctx.geometry)
        return grads[0].to(x.dtype), grads[1].to(weight.dtype), grads[2].to(weight.dtype), None


def _convolution_backward(grad_out: Tensor, x: Tensor, weight: Tensor, geometry: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The gradients of x, of the weight, and of a bias."""
    stride, padding, dilation, groups = geometry
    sizes = [weight.shape[0]]
    return torch.ops.aten.convolution_backward(
        grad_out, x, weight, sizes, stride, padding, dilation, False, [0, 0], groups, [True, True, True]
    )
