"""The paper's own experiments: the steps from a plain transformer to CMT-S, other norms (Tables 3 and 4), and scaling.

Importing this module registers the models, whose shapes are those of CMT-S:

* ``cmt_s_4stage``: "DeiT-S-4Stage", in four stages, with LMHSA; a 4 x 4 convolution for a stem, a plain FFN, no LPU,
  and no 1280 channels before the pooling;
* ``cmt_s_4stage_stem``: with CMT's stem and first patch aggregation;
* ``cmt_s_4stage_lpu``: with the LPU as well; ``cmt_s_4stage_lpu_noskip``: with one that lacks its shortcut;
* ``cmt_s_4stage_irffn``: with the LPU and the IRFFN; ``cmt_s_4stage_irffn_noskip``: with an IRFFN that lacks its
  shortcut. With the 1280 channels it is ``cmt_s``;
* ``cmt_s_layernorm``: CMT-S with LayerNorm for every BatchNorm; ``cmt_s_batchnorm``: BatchNorm for every LayerNorm.

timm's train.py imports it by ``--device-modules timm_cmt.ablation``. The paper does not print these networks: where it
is silent, they are as CMT-S, and what has no 1280 channels has a LayerNorm there instead, as DeiT has.
"""

import math
from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm2d, LayerType, get_act_layer
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from .checkpoint import read_shape
from .cmt import (
    CMT,
    MIN_SIZE,
    SHAPES,
    VARIANTS,
    FinalConv,
    InvertedResidualFFN,
    LightweightAttention,
    LocalPerceptionUnit,
    Stem,
    _cfg,
    _create_cmt,
    check_size,
)
from .layers import ActNormConv, to_channels_last
from .plugin import register_model

__all__ = ["FeedForward", "PatchStem", "scale_cmt"]

torch.fx.wrap("check_size")  # as in cmt.py


class PatchStem(nn.Module):
    """A 4 x 4 convolution of stride 4, then LayerNorm over the channels: the patch embedding of a four-stage DeiT.

    [B, in_chans, H, W] -> [B, C, (H + 1) // 4, (W + 1) // 4], the size that CMT's stem and first patch aggregation give

    Raises:
        ValueError: The image is under 32 pixels high or wide.
    """

    stride = 4

    def __init__(self, in_chans: int, dim: int, act_layer: LayerType | None = None, device=None, dtype=None):
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))  # for sides of 4 n + 3; the convolution does not see it elsewhere
        self.conv1 = nn.Conv2d(in_chans, dim, 4, stride=4, device=device, dtype=dtype)
        self.norm = LayerNorm2d(dim, eps=1e-5, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = check_size(x)
        return self.norm(to_channels_last(self.conv1(to_channels_last(self.pad(x)))))


class LocalConv(nn.Module):
    """The LPU without its shortcut: DWConv(X).

    [B, C, H, W] -> [B, C, H, W]
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        # Not named as the LPU's, whose weights mean something else.
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x)


class FeedForward(nn.Module):
    """The FFN of a transformer: Linear, GELU, Linear.

    [B, C, H, W] -> [B, C, H, W]
    """

    def __init__(
        self, dim: int, hidden_dim: int, act_layer: LayerType = nn.GELU, drop: float = 0.0, device=None, dtype=None
    ):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.act = get_act_layer(act_layer)()
        self.fc2 = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.act(self.fc1(x.permute(0, 2, 3, 1))))
        return self.drop(self.fc2(x)).permute(0, 3, 1, 2)


class InvertedFFN(nn.Sequential):
    """The IRFFN without its shortcut: Conv(DWConv(Conv(X))), with GELU and BatchNorm where the IRFFN has them.

    [B, C, H, W] -> [B, C, H, W]
    """

    def __init__(
        self, dim: int, hidden_dim: int, act_layer: LayerType = nn.GELU, drop: float = 0.0, device=None, dtype=None
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        local = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        layers: OrderedDict[str, nn.Module] = OrderedDict(  # not the IRFFN's names, whose weights mean something else
            expand=nn.Conv2d(dim, hidden_dim, 1, **dd),
            local=ActNormConv(local, act_layer=act_layer, drop=drop, **dd),
            project=ActNormConv(nn.Conv2d(hidden_dim, dim, 1, **dd), act_layer=act_layer, **dd),
            norm=nn.BatchNorm2d(dim, **dd),
            drop=nn.Dropout(drop),
        )
        super().__init__(layers)


def final_norm(in_dim: int, dim: int, device=None, dtype=None) -> nn.Module:
    """LayerNorm before the pooling, where CMT has its last convolution; the channels stay."""
    return LayerNorm2d(dim, eps=1e-6, device=device, dtype=dtype)


_LAYER_NORM: dict[str, Any] = dict(norm_layer=partial(LayerNorm2d, eps=1e-6))
_STEM = dict(lpu_layer=nn.Identity, mlp_layer=FeedForward, final_layer=final_norm, head_width=512)
_LPU = dict(_STEM, lpu_layer=LocalPerceptionUnit)
_IRFFN = dict(_LPU, mlp_layer=InvertedResidualFFN)

LAYERS: dict[str, dict[str, Any]] = dict(
    cmt_s_4stage=dict(_STEM, stem_layer=PatchStem, stem_width=64),
    cmt_s_4stage_stem=_STEM,
    cmt_s_4stage_lpu=_LPU,
    cmt_s_4stage_lpu_noskip=dict(_LPU, lpu_layer=LocalConv),
    cmt_s_4stage_irffn=_IRFFN,
    cmt_s_4stage_irffn_noskip=dict(_IRFFN, mlp_layer=InvertedFFN),
    cmt_s_layernorm=dict(
        stem_layer=partial(Stem, **_LAYER_NORM),
        attn_layer=partial(LightweightAttention, **_LAYER_NORM),
        mlp_layer=partial(InvertedResidualFFN, **_LAYER_NORM),
        final_layer=partial(FinalConv, **_LAYER_NORM),
    ),
    cmt_s_batchnorm=dict(norm_layer="batchnorm2d"),
)

for _name, _layers in LAYERS.items():  # by which a checkpoint of one that is loaded into another is named
    _small: dict[str, Any] = dict(VARIANTS["cmt_s"], depths=(1, 1, 1, 1), device="meta")
    _shape = read_shape(CMT(**dict(_small, **_layers)).state_dict())
    assert _shape is not None
    SHAPES[_name] = _shape._replace(depths=VARIANTS["cmt_s"]["depths"])

default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg(224) for name in LAYERS})


def _create(variant: str, pretrained: bool = False, **kwargs) -> CMT:
    args = dict(LAYERS[variant], **kwargs)
    if "embed_dims" in kwargs:  # other widths than CMT-S's: what has the channels of the first and the last stage
        for name, width in (("stem_width", kwargs["embed_dims"][0]), ("head_width", kwargs["embed_dims"][-1])):
            if name in LAYERS[variant]:
                args[name] = width
    return _create_cmt(variant, pretrained=pretrained, **args)


@register_model
def cmt_s_4stage(pretrained: bool = False, **kwargs) -> CMT:
    """DeiT-S-4Stage of Table 4: 81.4 top-1 there."""
    return _create("cmt_s_4stage", pretrained=pretrained, **kwargs)


@register_model
def cmt_s_4stage_stem(pretrained: bool = False, **kwargs) -> CMT:
    """With CMT's stem: 81.9 top-1 in Table 4."""
    return _create("cmt_s_4stage_stem", pretrained=pretrained, **kwargs)


@register_model
def cmt_s_4stage_lpu(pretrained: bool = False, **kwargs) -> CMT:
    """With CMT's stem and LPU: 82.7 top-1 in Table 4."""
    return _create("cmt_s_4stage_lpu", pretrained=pretrained, **kwargs)


@register_model
def cmt_s_4stage_lpu_noskip(pretrained: bool = False, **kwargs) -> CMT:
    """With CMT's stem and an LPU without shortcut: 82.0 top-1 in Table 3."""
    return _create("cmt_s_4stage_lpu_noskip", pretrained=pretrained, **kwargs)


@register_model
def cmt_s_4stage_irffn(pretrained: bool = False, **kwargs) -> CMT:
    """With CMT's stem, LPU and IRFFN: 83.3 top-1 in Table 4."""
    return _create("cmt_s_4stage_irffn", pretrained=pretrained, **kwargs)


@register_model
def cmt_s_4stage_irffn_noskip(pretrained: bool = False, **kwargs) -> CMT:
    """With CMT's stem, LPU and an IRFFN without shortcut: 82.5 top-1 in Table 3."""
    return _create("cmt_s_4stage_irffn_noskip", pretrained=pretrained, **kwargs)


@register_model
def cmt_s_layernorm(pretrained: bool = False, **kwargs) -> CMT:
    """CMT-S with LayerNorm for every BatchNorm: 82.8 top-1 in the paper."""
    return _create("cmt_s_layernorm", pretrained=pretrained, **kwargs)


@register_model
def cmt_s_batchnorm(pretrained: bool = False, **kwargs) -> CMT:
    """CMT-S with BatchNorm for every LayerNorm, which does not converge in the paper."""
    return _create("cmt_s_batchnorm", pretrained=pretrained, **kwargs)


def scale_cmt(phi: float, alpha: float = 1.2, beta: float = 1.3, gamma: float = 1.15) -> dict[str, Any]:
    """CMT-S scaled as eqs. 17-18 say: alpha^phi times as deep, beta^phi as wide, gamma^phi times the image's side.

    For ``timm.create_model("cmt_s", **scale_cmt(1))``. Table 5 has depth alone, ``scale_cmt(1, 2.2, 1, 1)``, and width
    alone, ``scale_cmt(1, 1, 1.6, 1)``. Rounded to the nearest are blocks, even widths, and sides in multiples of 32.

    The published models do not follow the rule. As they are (CMT-L's shape is inferred), and by the rule:

    ======  =====  =========  ========  ============  ===========  ==============  ===============
    model   phi    size       by rule   first width   by rule      blocks          by rule
    ======  =====  =========  ========  ============  ===========  ==============  ===============
    Ti      -2     160        160       46            38           2, 2, 10, 2     2, 2, 11, 2
    XS      -1     192        192       52            50           3, 3, 12, 3     3, 3, 13, 3
    S       0      224        224       64            64           3, 3, 16, 3     3, 3, 16, 3
    B       1      256        256       76            84           4, 4, 20, 4     4, 4, 19, 4
    L       2      288        288       88            108          5, 5, 25, 5     4, 4, 23, 4
    ======  =====  =========  ========  ============  ===========  ==============  ===============

    * The sizes are the rule's.
    * The blocks are no 1.2^phi. They are 1.25^phi, rounded up where CMT-S has 3 and down where it has 16.
    * The widths follow no base, however rounded: they grow more from XS to S than from Ti to XS, by more than rounding
      down, up or to the nearest explains. beta^(2 phi / 3) comes near, with 46, 54, 64, 76 and 90.

    Args:
        phi: The compound coefficient; 0 is CMT-S.
        alpha: Base of the depth.
        beta: Base of the width.
        gamma: Base of the image's side.

    Returns:
        Arguments of `CMT`: `img_size` in pixels, `stem_width`, `embed_dims` and `depths`.

    Raises:
        ValueError: The images would have sides under 32 pixels, or the first stage no channels.
    """
    base = VARIANTS["cmt_s"]
    size = 32 * _round(224 * gamma**phi / 32)
    width = 2 * _round(base["embed_dims"][0] * beta**phi / 2)
    if size < MIN_SIZE or width < 2:
        raise ValueError(f"phi {phi} gives images of {size} pixels and {width} channels; give one nearer to 0")
    depths = tuple(max(_round(depth * alpha**phi), 1) for depth in base["depths"])
    return dict(img_size=size, stem_width=width // 2, embed_dims=tuple(width * 2**i for i in range(4)), depths=depths)


def _round(value: float) -> int:
    return math.floor(value + 0.5)  # Python's own rounds 2.5 down
