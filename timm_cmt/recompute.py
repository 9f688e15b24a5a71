"""conv(BatchNorm(GELU(x))) that keeps x alone for its backward pass, which computes the rest anew."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["gelu_norm_conv"]


def gelu_norm_conv(x: Tensor, norm: nn.BatchNorm2d, conv: nn.Conv2d, shortcut: bool = False) -> Tensor:
    """conv(y), or conv(y) + y with `shortcut`, of y = norm(gelu(x)).

    The running statistics are updated as `norm` would. The gradients are those of the modules, to rounding; there are
    no second ones. Hooks on `norm` and `conv` are not called.
    """
    momentum = norm.momentum
    if norm.training:
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
            F.gelu(x), norm_weight, norm_bias, running_mean, running_var, batch_statistics, momentum, eps
        )
        if not batch_statistics:
            mean, invstd = running_mean.clone(), (running_var + eps).rsqrt()
        ctx.save_for_backward(x, norm_weight, norm_bias, conv_weight, mean, invstd)
        ctx.batch_statistics, ctx.eps, ctx.geometry, ctx.shortcut = batch_statistics, eps, geometry, shortcut
        out = F.conv2d(y, conv_weight, conv_bias, *geometry)
        return out + y if shortcut else out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, conv_weight, mean, invstd = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        activated = F.gelu(x)
        variance = invstd.square().reciprocal()
        y = F.batch_norm(activated, mean, variance, norm_weight, norm_bias, training=False, eps=0.0)
        grad_y, grad_conv_weight, grad_conv_bias = torch.ops.aten.convolution_backward(
            grad_out.to(x.dtype),  # under autocast in another precision than the parameters
            y,
            conv_weight.to(x.dtype),
            [conv_weight.shape[0]],
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            [True, True, True],
        )
        del y
        if ctx.shortcut:
            grad_y = grad_y + grad_out.to(x.dtype)
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
        grad_x = torch.ops.aten.gelu_backward(grad_x, x)
        return (
            grad_x,
            grad_norm_weight,
            grad_norm_bias,
            grad_conv_weight.to(conv_weight.dtype),
            grad_conv_bias.to(conv_weight.dtype),
            *[None] * 7,
        )
