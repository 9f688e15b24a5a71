"""CMT: Convolutional Neural Networks Meet Vision Transformers

Paper: `CMT: Convolutional Neural Networks Meet Vision Transformers` - https://arxiv.org/abs/2107.06263
(Guo, Han, Wu, Tang, Chen, Wang, Xu; CVPR 2022). Authors' code: https://github.com/ggjy/CMT.pytorch, whose released
weights load here.

Where the paper and the authors' code differ, this follows the code, which the weights need:
* the input of LMHSA is reduced first and projected to k and v then (the paper: the reverse);
* the relative position bias is one parameter per stage, shared by the stage's blocks;
* the IRFFN ratio of CMT-XS is 3.77 (Table 1 prints 3.8), and CMT-S has 26.3 M parameters (Table 1 prints 25.1 M).
CMT-L has neither weights nor a published shape; see `cmt_l`.

SPDX-License-Identifier: Apache-2.0
"""

import argparse
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    GELU,
    DropPath,
    LayerNorm2d,
    LayerType,
    calculate_drop_path_rates,
    create_classifier,
    get_act_layer,
    get_norm_layer,
    register_notrace_function,
    register_notrace_module,
    to_2tuple,
    trunc_normal_,
    use_fused_attn,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    clean_state_dict,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    is_model,
    model_entrypoint,
    named_apply,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices  # timm exports it nowhere; its own models import it from here
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights

from .checkpoint import (
    Geometry,
    from_authors_layout,
    get_weights,
    refuse_incomplete,
    refuse_misfit,
    refuse_other_network,
)
from .fused import (
    ChannelsLastGELU,
    can_fuse,
    conv_in_float32,
    gelu_norm_conv,
    statistics_kept,
    to_channels_last,
)
from .rel_pos_bias import RelPosBias, is_plain_tensor
from .weights import RELEASE_URL, ensure_whole, get_hub_id

__all__ = ["CMT"]

_logger = logging.getLogger(__name__)

register_notrace_module(RelPosBias)  # whether it resizes depends on the input's size, which FX cannot follow

HEAD_WIDTH = 1280  # channels before the pooling
MIN_SIZE = 32  # pixels: below it the last stage has no token
# On AMD's processors, the ones measured, MKL's products are half as fast as oneDNN's where there is AVX-512, and 1.1 to
# 1.5 times as fast where there is none.
ONEDNN_OVER_MKL = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


@register_notrace_function
def check_size(x: Tensor, min_size: int = MIN_SIZE) -> Tensor:  # an argument, since TorchScript knows no globals
    """Raise ValueError for an image too small to leave a token in the last stage; else return it."""
    H, W = x.shape[-2:]
    if H < min_size or W < min_size:
        raise ValueError(f"an image of {H} x {W} pixels is too small for CMT; it takes {min_size} x {min_size} or more")
    return x


def get_grid_sizes(img_size: tuple[int, int], num_stages: int = 4) -> list[tuple[int, int]]:
    """(height, width) in tokens of each stage's feature map for an image of (height, width) pixels."""
    H, W = ((size + 1) // 2 for size in img_size)  # the stem's padded stride-2 convolution rounds up
    return [(H >> i, W >> i) for i in range(1, num_stages + 1)]  # the 2 x 2 convolutions round down


@torch.no_grad()
def fold_shortcut(conv: nn.Conv2d) -> None:
    """Make a depth-wise convolution of an odd, padded kernel add its input: conv(x) becomes conv(x) + x."""
    conv.weight[:, 0, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] += 1


def fold_norm_into_conv_before(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """conv(x) becomes norm(conv(x)), of the norm in evaluation."""
    statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)


@torch.no_grad()
def fold_norm_into_conv_after(norm: nn.BatchNorm2d, conv: nn.Conv2d) -> None:
    """conv(x) becomes conv(norm(x)), of the norm in evaluation; the convolution has one group and no padding."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    conv.bias += conv.weight.sum((2, 3)) @ (norm.bias - norm.running_mean * scale)
    conv.weight *= scale[:, None, None]


class Stem(nn.Module):
    """Three 3 x 3 convolutions, the first of stride 2, each followed by GELU, then BatchNorm (section 3.1).

    [B, in_chans, H, W] -> [B, C, ceil(H / 2), ceil(W / 2)]

    Raises:
        ValueError: The image is under 32 pixels high or wide.
    """

    def __init__(self, in_chans: int, dim: int, act_layer: LayerType = nn.GELU, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        act_layer = get_act_layer(act_layer)
        self.conv1 = nn.Conv2d(in_chans, dim, 3, stride=2, padding=1, **dd)
        self.act1 = act_layer()
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.act2 = act_layer()
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.conv3 = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.act3 = act_layer()
        self.norm3 = nn.BatchNorm2d(dim, **dd)
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        x = check_size(x)  # here, not in CMT.forward: timm's feature extractors take the model apart
        # LayerNorm2d and attention want channels-last memory, in which depth-wise convolutions are faster too. Again
        # after the convolution, since images of one channel do not tell it their layout.
        x = to_channels_last(self.conv1(to_channels_last(x)))
        if not torch.jit.is_scripting():
            convs, norms = (self.conv1, self.conv2, self.conv3), (self.norm1, self.norm2)
            recompute = self.recompute and self.training
            if can_fuse(x, convs, (self.act1, self.act2), norms, recompute=recompute):
                x = gelu_norm_conv(x, self.norm1, self.conv2)
                x = gelu_norm_conv(x, self.norm2, self.conv3)
                return self.norm3(self.act3(x))
        x = self.conv2(self.norm1(self.act1(x)))
        x = self.conv3(self.norm2(self.act2(x)))
        x = self.norm3(self.act3(x))
        return x


class PatchAggregation(nn.Module):
    """A 2 x 2 convolution of stride 2, then LayerNorm over the channels (section 3.1).

    [B, C_in, H, W] -> [B, C, H // 2, W // 2]
    """

    def __init__(self, in_dim: int, dim: int, norm_layer: LayerType = LayerNorm2d, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_dim, dim, 2, stride=2, **dd)
        self.norm = norm_layer(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class LocalPerceptionUnit(nn.Module):
    """LPU(X) = DWConv(X) + X (eq. 1), with a 3 x 3 kernel.

    [B, C, H, W] -> [B, C, H, W]
    """

    has_shortcut: torch.jit.Final[bool]

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        self.has_shortcut = True

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x if self.has_shortcut else self.conv(x)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the shortcut into the kernel, for inference."""
        if self.has_shortcut:
            fold_shortcut(self.conv)
            self.has_shortcut = False


def is_formula_faster(device: str, dtype: torch.dtype, head_bytes: int, bias_grad: bool) -> bool:
    """Is attention by the formula faster than what `scaled_dot_product_attention` runs there, with a bias?"""
    if device == "cpu":
        # Its fused kernel gives the bias no gradient, and what SDPA falls back to is slower, as that kernel itself is
        # in bfloat16.
        return bias_grad or dtype == torch.bfloat16
    # CUDA's fused kernels that take a bias want 16 bytes at a time of each head, which 46 channels are not, nor 52 and
    # 76 in half precision; what SDPA falls back to computes in float32.
    return device == "cuda" and head_bytes % 16 != 0


@register_notrace_function
def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, dropout_p: float, fused: bool) -> Tensor:
    """softmax(q k^T * scale + bias) v: [B, heads, N, d], [B, heads, M, d] twice, [heads, N, M] -> [B, heads, N, d]."""
    slow = is_formula_faster(bias.device.type, q.dtype, q.shape[-1] * q.element_size(), bias.requires_grad)
    # A trace's check repeats it without gradients and wants the same operations.
    if fused and not slow and not torch.jit.is_tracing():
        # Four dimensions: with a mask of three the CPU's fused kernel is left out too.
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0), dropout_p=dropout_p, scale=scale)
    attn = (q * scale) @ k.transpose(-2, -1) + bias
    return F.dropout(attn.softmax(dim=-1), dropout_p) @ v


class TokenLinear(nn.Linear):
    """nn.Linear of tokens, [B, N, in_features] -> [B, N, out_features]."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and not torch.jit.is_tracing() and not torch.compiler.is_compiling():
            plain = is_plain_tensor(x) and is_plain_tensor(self.weight)
            if ONEDNN_OVER_MKL and plain and x.device.type == "cpu" and x.dtype != torch.float64:  # oneDNN has none
                # As a convolution it is oneDNN's, of tensors laid out channels-last: tokens are such a map as they lie.
                weight = self.weight[:, None, None].permute(0, 3, 1, 2)
                return F.conv2d(x[:, None].permute(0, 3, 1, 2), weight, self.bias).flatten(2).transpose(1, 2)
        return F.linear(x, self.weight, self.bias)


def wants_float32(x: Tensor) -> bool:
    """Is x on the CPU and in bfloat16, or in float32 that autocast would cast, where gradients are wanted?"""
    if torch.jit.is_tracing() or not isinstance(x, Tensor):  # FX has proxies
        return False
    is_low = x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and torch.is_autocast_enabled("cpu"))
    return is_low and x.is_cpu and torch.is_grad_enabled()


class Reduction(nn.Conv2d):
    """The depth-wise convolution of kernel and stride k that reduces keys and values k-fold on each side (eq. 2)."""

    def __init__(self, dim: int, k: int, device=None, dtype=None):
        super().__init__(dim, dim, k, stride=k, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if wants_float32(x):
                # In float32, which costs little: the CPU's gradient of this convolution in bfloat16 is 10 times slower.
                with torch.autocast("cpu", enabled=False):
                    if not torch.compiler.is_compiling() and is_plain_tensor(x) and is_plain_tensor(self.weight):
                        return conv_in_float32(x, self)
                    return self._conv_forward(x.float(), self.weight.float(), self.bias.float()).to(x.dtype)
        return self._conv_forward(x, self.weight, self.bias)


class LightweightAttention(nn.Module):
    """LMHSA: softmax(Q K'^T / sqrt(d) + B) V', K' and V' from a map reduced k-fold on each side (eqs. 2-3).

    [B, C, H, W], bias [heads, H * W, (H // k) * (W // k)] -> [B, C, H, W]

    The reduction is a depth-wise convolution of kernel and stride k, then BatchNorm; there is none where k is 1.

    Args:
        dim: Channels C.
        num_heads: Attention heads; they divide C.
        sr_ratio: Reduction k.
        attn_drop: Dropout probability of the attention weights.
        proj_drop: Dropout probability of the output.

    Raises:
        ValueError: The heads do not divide the channels.
    """

    fused_attn: torch.jit.Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int = 1,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {dim} channels; choose embed_dims that num_heads divide")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = use_fused_attn()

        self.q = TokenLinear(dim, dim, **dd)
        if sr_ratio > 1:
            self.sr = Reduction(dim, sr_ratio, **dd)
            self.sr_norm = nn.BatchNorm2d(dim, **dd)
        else:
            self.sr = nn.Identity()
            self.sr_norm = nn.Identity()
        self.kv = TokenLinear(dim, 2 * dim, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = TokenLinear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        B, C, H, W = x.shape
        q = self.q(x.flatten(2).transpose(1, 2))  # [B, N, C]
        q = q.reshape(B, H * W, self.num_heads, self.head_dim).transpose(1, 2)  # [B, heads, N, d]
        x = self.sr_norm(self.sr(x))  # [B, C, H // k, W // k]
        kv = self.kv(x.flatten(2).transpose(1, 2))  # [B, M, 2 * C]
        kv = kv.reshape(B, kv.shape[1], 2, self.num_heads, self.head_dim)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, M, d]

        dropout_p = self.attn_drop.p if self.training else 0.0
        x = attend(q, k, v, bias.to(q.dtype), self.scale, dropout_p, self.fused_attn)  # [B, heads, N, d]
        x = x.transpose(1, 2).reshape(B, H * W, C)
        x = self.proj_drop(self.proj(x))
        return x.transpose(1, 2).reshape(B, C, H, W)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the BatchNorm into the reduction before it, and the scale into the queries, for inference."""
        if isinstance(self.sr_norm, nn.BatchNorm2d):
            fold_norm_into_conv_before(self.sr, self.sr_norm)
            self.sr_norm = nn.Identity()
        with torch.no_grad():
            self.q.weight.mul_(self.scale)
            self.q.bias.mul_(self.scale)
        self.scale = 1.0


class InvertedResidualFFN(nn.Module):
    """IRFFN(X) = Conv(F(Conv(X))), F(X) = DWConv(X) + X (eqs. 4-5).

    [B, C, H, W] -> [B, C, H, W]

    GELU, then BatchNorm, follow the first convolution and F; BatchNorm alone follows the last.

    Args:
        dim: Channels C.
        hidden_dim: Channels between the two 1 x 1 convolutions.
        act_layer: The activation.
        drop: Dropout probability after the first BatchNorm and after the last.
    """

    has_shortcut: torch.jit.Final[bool]

    def __init__(
        self, dim: int, hidden_dim: int, act_layer: LayerType = nn.GELU, drop: float = 0.0, device=None, dtype=None
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        act_layer = get_act_layer(act_layer)
        self.conv1 = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.act1 = act_layer()
        self.norm1 = nn.BatchNorm2d(hidden_dim, **dd)
        self.drop1 = nn.Dropout(drop)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.act2 = act_layer()
        self.norm2 = nn.BatchNorm2d(hidden_dim, **dd)
        self.conv2 = nn.Conv2d(hidden_dim, dim, 1, **dd)
        self.norm3 = nn.BatchNorm2d(dim, **dd)
        self.drop2 = nn.Dropout(drop)
        self.has_shortcut = True
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if not torch.jit.is_scripting():
            convs, norms = (self.conv1, self.dwconv, self.conv2), (self.norm1, self.norm2)
            recompute = self.recompute and self.training
            if can_fuse(x, convs, (self.act1, self.act2), norms, (self.drop1,), recompute):
                x = gelu_norm_conv(x, self.norm1, self.dwconv, self.has_shortcut)
                x = gelu_norm_conv(x, self.norm2, self.conv2)
                return self.drop2(self.norm3(x))
        x = self.drop1(self.norm1(self.act1(x)))
        x = self.norm2(self.act2(self.dwconv(x) + x if self.has_shortcut else self.dwconv(x)))
        x = self.drop2(self.norm3(self.conv2(x)))
        return x

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the shortcut into the kernel, and both BatchNorms around the last convolution into it, for inference.

        The first BatchNorm stays: it comes before a padded convolution, whose zeros at the border it does not shift.
        """
        if self.has_shortcut:
            fold_shortcut(self.dwconv)
            self.has_shortcut = False
        if isinstance(self.norm2, nn.BatchNorm2d):
            fold_norm_into_conv_after(self.norm2, self.conv2)
            self.norm2 = nn.Identity()
        if isinstance(self.norm3, nn.BatchNorm2d):
            fold_norm_into_conv_before(self.conv2, self.norm3)
            self.norm3 = nn.Identity()


class Block(nn.Module):
    """One CMT block: LPU, LMHSA and IRFFN (eqs. 6-8).

    [B, C, H, W], bias [heads, H * W, (H // k) * (W // k)] -> [B, C, H, W]

    Args:
        dim: Channels C.
        num_heads: Attention heads.
        sr_ratio: Reduction k of the keys and values, on each side.
        mlp_ratio: Ratio R of the IRFFN's hidden width, int(C * R), to C.
        proj_drop: Dropout probability in LMHSA's output and the IRFFN.
        attn_drop: Dropout probability of the attention weights.
        drop_path: Probability of dropping each of the two residual branches.
        act_layer: The activation.
        norm_layer: The normalisation before LMHSA and IRFFN, of [B, C, H, W].
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int = 1,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: LayerType = nn.GELU,
        norm_layer: LayerType = LayerNorm2d,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.lpu = LocalPerceptionUnit(dim, **dd)
        self.norm1 = norm_layer(dim, **dd)
        self.attn = LightweightAttention(
            dim, num_heads, sr_ratio=sr_ratio, attn_drop=attn_drop, proj_drop=proj_drop, **dd
        )
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = InvertedResidualFFN(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.lpu(x)  # eq. 6
        x = x + self.drop_path1(self.attn(self.norm1(x), bias))  # eq. 7
        x = x + self.drop_path2(self.mlp(self.norm2(x)))  # eq. 8
        return x


def _keep_statistics_once_run(block: Block) -> Callable[[Tensor, Tensor], Tensor]:
    """The block for `checkpoint`: its second run, in the backward pass, leaves BatchNorm's statistics as they are."""
    has_run = False

    def run(x: Tensor, bias: Tensor) -> Tensor:
        nonlocal has_run
        with statistics_kept(block) if has_run else nullcontext():
            has_run = True
            return block(x, bias)

    return run


class Stage(nn.Module):
    """Patch aggregation, then the stage's blocks, which share one relative position bias.

    [B, C_in, H, W] -> [B, C, H // 2, W // 2]

    Args:
        in_dim: Channels C_in.
        dim: Channels C.
        depth: Blocks.
        grid_size: (height, width) of the stage's output in tokens, at the size the model is built for.
        drop_path: Drop-path probability of each block.
        downsample_norm_layer: The normalisation of the patch aggregation.
        The others: as in `Block`.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        depth: int,
        grid_size: tuple[int, int],
        num_heads: int,
        sr_ratio: int,
        mlp_ratio: float,
        proj_drop: float,
        attn_drop: float,
        drop_path: list[float],
        act_layer: LayerType,
        norm_layer: LayerType,
        downsample_norm_layer: LayerType,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.downsample = PatchAggregation(in_dim, dim, norm_layer=downsample_norm_layer, **dd)
        self.rel_pos_bias = RelPosBias(num_heads, grid_size, sr_ratio=sr_ratio, **dd)
        self.blocks = nn.ModuleList(
            Block(
                dim,
                num_heads,
                sr_ratio=sr_ratio,
                mlp_ratio=mlp_ratio,
                proj_drop=proj_drop,
                attn_drop=attn_drop,
                drop_path=drop_path[i],
                act_layer=act_layer,
                norm_layer=norm_layer,
                **dd,
            )
            for i in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        bias = self.rel_pos_bias(x.shape[2], x.shape[3])
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block if torch.compiler.is_compiling() else _keep_statistics_once_run(block), x, bias)
            else:
                x = block(x, bias)
        return x


class ConvHead(nn.Module):
    """A 1 x 1 convolution, BatchNorm and SiLU, before the pooling.

    [B, C, H, W] -> [B, C_out, H, W]
    """

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_dim, dim, 1, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the BatchNorm into the convolution before it, for inference."""
        if isinstance(self.norm, nn.BatchNorm2d):
            fold_norm_into_conv_before(self.conv, self.norm)
            self.norm = nn.Identity()


class CMT(nn.Module):
    """CMT (section 3): a convolutional stem, four stages of blocks at strides 4 to 32, a 1280-channel head.

    [B, in_chans, H, W] -> [B, num_classes], for any H, W of at least 32 pixels: the relative position bias is resized
    where the image is not of the size the model was built for.

    Args:
        img_size: Height and width in pixels that the relative position bias is built for.
        in_chans: Channels of the input.
        num_classes: Classes; 0 for no classifier.
        global_pool: Pooling over the last feature map, one of timm's; '' for none, where num_classes is 0.
        stem_width: Channels of the stem.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        sr_ratios: Reduction k of keys and values in each stage, on each side.
        mlp_ratio: Ratio R of the IRFFN's hidden width to the stage's.
        drop_rate: Dropout probability before the classifier.
        proj_drop_rate: Dropout probability in LMHSA's output and the IRFFN.
        attn_drop_rate: Dropout probability of the attention weights.
        drop_path_rate: Drop-path probability of the last block; it rises linearly from 0 at the first.
        act_layer: The activation of stem and IRFFN; paper: GELU.
        norm_layer: The normalisation of [B, C, H, W] maps in blocks and patch aggregation; paper: LayerNorm, whose eps
            is 1e-6 in the blocks and 1e-5 in the patch aggregation.
        recompute_act: In eager training, keep two tensors of the IRFFN's hidden width for its backward pass rather than
            six (and fewer in the stem), and compute the others anew: half the memory, without a second run of any
            convolution. Blocks with hooks on these layers, or others in their place, train as without it. There are no
            second gradients.

    Raises:
        ValueError: An image size under 32, a number of heads that does not divide its stage's channels, or
            `recompute_act` with a `proj_drop_rate` or another `act_layer`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_width: int = 32,
        embed_dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (3, 3, 16, 3),
        num_heads: tuple[int, ...] = (1, 2, 4, 8),
        sr_ratios: tuple[int, ...] = (8, 4, 2, 1),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: LayerType = "gelu",
        norm_layer: LayerType | None = None,
        recompute_act: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if recompute_act and proj_drop_rate > 0.0:
            raise ValueError(f"recompute_act leaves no place for proj_drop_rate {proj_drop_rate}; give one of the two")
        if recompute_act and get_act_layer(act_layer) not in (GELU, nn.GELU):
            raise ValueError(f"recompute_act is for GELU alone, not for act_layer {act_layer}; give one of the two")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        # Forward takes any size, although timm and its scripts build the model for the one they are asked for.
        self._traits = {"fixed_input_size": False}
        act_layer = get_act_layer(act_layer)
        if act_layer in (GELU, nn.GELU):
            act_layer = ChannelsLastGELU
        block_norm = get_norm_layer(norm_layer) or partial(LayerNorm2d, eps=1e-6)
        downsample_norm = get_norm_layer(norm_layer) or partial(LayerNorm2d, eps=1e-5)

        num_stages = len(depths)
        grid_sizes = get_grid_sizes(_check_img_size(img_size), num_stages)
        drop_paths = calculate_drop_path_rates(drop_path_rate, sum(depths))
        self.stem = Stem(in_chans, stem_width, act_layer=act_layer, **dd)
        self.feature_info = [dict(num_chs=stem_width, reduction=2, module="stem")]
        in_dim = stem_width
        stages = []
        for i in range(num_stages):
            stages.append(
                Stage(
                    in_dim,
                    embed_dims[i],
                    depth=depths[i],
                    grid_size=grid_sizes[i],
                    num_heads=num_heads[i],
                    sr_ratio=sr_ratios[i],
                    mlp_ratio=mlp_ratio,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=drop_paths[sum(depths[:i]) : sum(depths[: i + 1])],
                    act_layer=act_layer,
                    norm_layer=block_norm,
                    downsample_norm_layer=downsample_norm,
                    **dd,
                )
            )
            in_dim = embed_dims[i]
            self.feature_info.append(dict(num_chs=in_dim, reduction=4 * 2**i, module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, (Stem, InvertedResidualFFN)):
                module.recompute = recompute_act

        self.num_features = self.head_hidden_size = HEAD_WIDTH
        self.conv_head = ConvHead(in_dim, HEAD_WIDTH, **dd)
        self.global_pool, self.head = create_classifier(HEAD_WIDTH, num_classes, pool_type=global_pool, **dd)
        self.head_drop = nn.Dropout(drop_rate)

        self.init_weights()
        self.register_load_state_dict_pre_hook(_adapt_checkpoint)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise as the authors do."""
        named_apply(_init_weights, self)

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """torch's, for the authors' layout and other input sizes too. What is refused leaves the model as it was.

        Raises:
            RuntimeError: The checkpoint is of another network or variant, or does not fit.
        """
        if strict:  # torch tells the hook nothing of `strict`, and would complain after it has loaded
            state_dict = from_authors_layout(state_dict)
            refuse_misfit(self, state_dict, GEOMETRIES)
            refuse_incomplete(self, state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()  # the authors decay the relative position bias too

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r"^stem",
            blocks=r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.(?:downsample|rel_pos_bias)", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^conv_head", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resize the relative position bias of every stage for good.

        Parameters whose size changes are replaced: an optimizer made before does not know the new ones.

        Args:
            img_size: The new height and width in pixels.

        Raises:
            ValueError: A side is under 32 pixels.
        """
        img_size = _check_img_size(img_size)
        for stage, grid_size in zip(self.stages, get_grid_sizes(img_size, len(self.stages))):
            stage.rel_pos_bias.set_query_size(grid_size)
        _record_input_size(self, self.in_chans, img_size)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; the pooling stays as it is unless one is named."""
        param = next(self.parameters())
        self.num_classes = num_classes
        self.global_pool, self.head = create_classifier(
            self.head_hidden_size,
            num_classes,
            pool_type=self.global_pool.pool_type if global_pool is None else global_pool,
            device=param.device,
            dtype=param.dtype,
        )
        self.global_pool.train(self.training)
        self.head.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Forward features that returns intermediates.

        Args:
            x: Images, [B, in_chans, H, W].
            indices: The last n features if int, all if None, those of the sequence else; 0 is the stem, 1-4 the stages.
            norm: As in timm's other models; CMT has no norm to apply to intermediates.
            stop_early: Stop after the last feature asked for.
            output_fmt: 'NCHW', the only one.
            intermediates_only: Return the intermediates alone.

        Returns:
            The intermediates, or (what forward_features returns, intermediates).

        Raises:
            ValueError: Another output_fmt.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt} is not there; CMT's features are 'NCHW'")
        intermediates: list[Tensor] = []
        take_indices, max_index = feature_take_indices(len(self.stages) + 1, indices)

        x = self.stem(x)
        feat_idx = 0
        if feat_idx in take_indices:
            intermediates.append(x)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice
            stages = self.stages
        else:
            stages = self.stages[:max_index]
        for feat_idx, stage in enumerate(stages, start=1):
            x = stage(x)
            if feat_idx in take_indices:
                intermediates.append(x)

        if intermediates_only:
            return intermediates
        if feat_idx == len(self.stages):
            x = self.conv_head(x)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the intermediates of these indices do not need.

        Args:
            indices: As in forward_intermediates.
            prune_norm: Drop the 1 x 1 convolution and norm before the pooling even where the last stage is kept.
            prune_head: Drop the classifier and pooling; they go in any case where stages do.

        Returns:
            The indices of the intermediates that are kept.
        """
        take_indices, max_index = feature_take_indices(len(self.stages) + 1, indices)
        prune_end = max_index < len(self.stages)
        self.stages = self.stages[:max_index]
        if prune_norm or prune_end:
            self.conv_head = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_norm or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, 1280, H / 32, W / 32], after the head's 1 x 1 convolution."""
        x = self.stem(x)
        x = self.stages(x)
        x = self.conv_head(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, 1280, h, w] -> [B, num_classes], or [B, 1280] before the classifier if `pre_logits`."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


def _init_weights(module: nn.Module, name: str = "") -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")  # fan_out is not divided by the groups
        nn.init.zeros_(module.bias)
    elif hasattr(module, "reset_parameters"):  # norms and relative position biases
        module.reset_parameters()


def _check_img_size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    size = tuple(to_2tuple(img_size))
    if len(size) != 2 or not all(isinstance(side, Integral) and side >= MIN_SIZE for side in size):
        raise ValueError(
            f"img_size {img_size} is no size for CMT; it takes (height, width) of at least {MIN_SIZE} pixels"
        )
    return size


def _record_input_size(model: nn.Module, in_chans: int, img_size: tuple[int, int]) -> None:
    """Let the instance's config say what it is built for, so that what timm saves of it reloads at its own size.

    timm has no public setter for the record of newer versions (`get_model_input_config`), so it is written here.
    """
    if hasattr(model, "pretrained_cfg"):  # a CMT made without timm's factory has none
        model.pretrained_cfg["input_size"] = (in_chans, *img_size)
        model.pretrained_cfg["pool_size"] = get_grid_sizes(img_size)[-1]
    model._traits = dict(getattr(model, "_traits", {}), img_size=img_size)
    if "img_size" in getattr(model, "_model_args", {}):
        model._model_args = dict(model._model_args, img_size=img_size)


def _adapt_checkpoint(model: CMT, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before anything is loaded: misfits raise, the authors' layout becomes ours, biases get the model's size."""
    given = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    adapted = from_authors_layout(given)
    refuse_misfit(model, adapted, GEOMETRIES)
    biases = {f"stages.{i}.rel_pos_bias.": stage.rel_pos_bias for i, stage in enumerate(model.stages)}
    old_grids = [bias.resize_in(adapted, name) for name, bias in biases.items()]
    if old_grids and old_grids[0] and old_grids[0] != model.stages[0].rel_pos_bias.query_size:
        sides = [4 * side for side in old_grids[0] + model.stages[0].rel_pos_bias.query_size]  # at stride 4
        _logger.info("Resized the relative position bias from %d x %d to %d x %d pixels", *sides)
    for key in given:
        del state_dict[prefix + key]
    state_dict.update({prefix + key: value for key, value in adapted.items()})


VARIANTS: dict[str, dict[str, Any]] = dict(
    cmt_ti=dict(stem_width=16, embed_dims=(46, 92, 184, 368), depths=(2, 2, 10, 2), mlp_ratio=3.6),
    cmt_xs=dict(stem_width=16, embed_dims=(52, 104, 208, 416), depths=(3, 3, 12, 3), mlp_ratio=3.77),
    cmt_s=dict(stem_width=32, embed_dims=(64, 128, 256, 512), depths=(3, 3, 16, 3), mlp_ratio=4.0),
    cmt_b=dict(stem_width=38, embed_dims=(76, 152, 304, 608), depths=(4, 4, 20, 4), mlp_ratio=4.0),
    cmt_l=dict(stem_width=44, embed_dims=(88, 176, 352, 704), depths=(5, 5, 25, 5), mlp_ratio=4.0),
)


GEOMETRIES = {name: Geometry(args["stem_width"], args["embed_dims"], args["depths"]) for name, args in VARIANTS.items()}


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: CMT) -> dict[str, Any]:
    """The state dict, in our layout, that a checkpoint of ours or of the authors' holds.

    Raises:
        RuntimeError: It is not one of a CMT, or of another variant.
    """
    state_dict = from_authors_layout(clean_state_dict(get_weights(checkpoint)))
    refuse_other_network(model, state_dict, GEOMETRIES)
    missing = [name for name, _ in model.named_parameters() if name not in state_dict and not name.startswith("head.")]
    if missing:  # timm loads without `strict` where the classes differ, and would leave these as they are
        raise RuntimeError(
            f"this checkpoint is not whole: it lacks {missing[0]} and {len(missing) - 1} others of the model"
        )
    return state_dict


def _create_cmt(variant: str, pretrained: bool = False, **kwargs) -> CMT:
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3, 4))
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    org = os.environ.get("TIMM_CMT_HUB_ORG")
    if org and cfg in get_arch_pretrained_cfgs(variant).values() and cfg.has_weights:  # nobody named another source
        kwargs["pretrained_cfg_overlay"] = dict(hf_hub_id=f"{org}/{variant}.{cfg.tag}")
        cfg = resolve_pretrained_cfg(variant, cfg.tag, kwargs["pretrained_cfg_overlay"])
    # timm hands on the config's size only where that says it is fixed; a config saved from an instance does not.
    img_size = kwargs.setdefault("img_size", tuple(cfg.input_size[-2:]))
    # The authors' training checkpoints hold their command line. Where timm loads a URL, it allows no such thing.
    # On leaving, torch would also take back what a user has allowed.
    allowed = argparse.Namespace in torch.serialization.get_safe_globals()
    with nullcontext() if allowed else torch.serialization.safe_globals([argparse.Namespace]):
        if pretrained:
            ensure_whole(cfg, kwargs.get("cache_dir"))
        try:
            model = build_model_with_cfg(
                CMT,
                variant,
                pretrained,
                pretrained_filter_fn=checkpoint_filter_fn,
                feature_cfg=dict(out_indices=out_indices, flatten_sequential=True),
                **dict(VARIANTS[variant], **kwargs),
            )
        except SafetensorError as err:
            raise RuntimeError(
                f"the weights in {cfg.hf_hub_id or cfg.file} are no whole safetensors file ({err}); publish them again"
            ) from err
    _record_input_size(model, kwargs.get("in_chans", cfg.input_size[0]), _check_img_size(img_size))
    return model


def _cfg(size: int, file: str = "", name: str = "", **kwargs) -> dict[str, Any]:
    return {
        "url": f"{RELEASE_URL}/{file}" if file else "",
        "hf_hub_id": get_hub_id(name),
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": get_grid_sizes((size, size))[-1],
        "fixed_input_size": True,  # so that timm and its scripts build the model at the size they are asked for
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head",
        "license": "mit",
        "origin_url": "https://github.com/ggjy/CMT.pytorch",
        "paper_name": "CMT: Convolutional Neural Networks Meet Vision Transformers",
        "paper_ids": "arXiv:2107.06263",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "cmt_ti.in1k": _cfg(160, file="cmt_tiny.pth", name="cmt_ti.in1k"),
        "cmt_xs.in1k": _cfg(192, file="cmt_xs.pth", name="cmt_xs.in1k"),
        "cmt_s.in1k": _cfg(224, file="cmt_small.pth", name="cmt_s.in1k"),
        "cmt_b.in1k": _cfg(256, file="cmt_base.pth", name="cmt_b.in1k"),
        "cmt_l.untrained": _cfg(288),
    }
)


_taken = [name for name in VARIANTS if is_model(name) and model_entrypoint(name).__module__ != __name__]
if _taken:
    warnings.warn(
        f"timm-cmt: timm has its own {', '.join(_taken)}, which stay; those of timm-cmt are not registered",
        stacklevel=2,
    )


def _register_model(fn: Callable[..., CMT]) -> Callable[..., CMT]:
    """timm's register_model, for names that are free."""
    return fn if is_model(fn.__name__) else register_model(fn)


@_register_model
def cmt_ti(pretrained: bool = False, **kwargs) -> CMT:
    """CMT-Ti, for 160 x 160 pixels."""
    return _create_cmt("cmt_ti", pretrained=pretrained, **kwargs)


@_register_model
def cmt_xs(pretrained: bool = False, **kwargs) -> CMT:
    """CMT-XS, for 192 x 192 pixels."""
    return _create_cmt("cmt_xs", pretrained=pretrained, **kwargs)


@_register_model
def cmt_s(pretrained: bool = False, **kwargs) -> CMT:
    """CMT-S, for 224 x 224 pixels."""
    return _create_cmt("cmt_s", pretrained=pretrained, **kwargs)


@_register_model
def cmt_b(pretrained: bool = False, **kwargs) -> CMT:
    """CMT-B, for 256 x 256 pixels."""
    return _create_cmt("cmt_b", pretrained=pretrained, **kwargs)


@_register_model
def cmt_l(pretrained: bool = False, **kwargs) -> CMT:
    """CMT-L, for 288 x 288 pixels. Its shape is inferred, and it has no weights.

    The paper gives 74.7 M parameters, 19.5 G multiply-adds and 84.8 top-1 at 288 x 288, and nothing else. The widths
    and depths here are the one (d; a, a, b, a) pattern with R = 4 that meets both figures.
    """
    return _create_cmt("cmt_l", pretrained=pretrained, **kwargs)
