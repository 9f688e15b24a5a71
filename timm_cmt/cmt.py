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

from collections.abc import Callable, Mapping
from functools import partial
from numbers import Integral
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    LayerNorm2d,
    LayerType,
    calculate_drop_path_rates,
    create_classifier,
    get_norm_layer,
    register_notrace_module,
    to_2tuple,
    trunc_normal_,
    use_fused_attn,
)
from timm.models import clean_state_dict, generate_default_cfgs, named_apply
from timm.models._features import feature_take_indices  # timm exports it nowhere; its own models import it from here
from torch import Tensor, nn

from .checkpoint import Shape, adapt, get_weights, refuse_misfit
from .layers import ActNormConv, ConvNorm, attend, fold_norm_after, make_act, plain_conv, run_block, to_channels_last
from .plugin import build_model_with_cfg, register_model, update_model_input_size
from .rel_pos_bias import RelPosBias
from .weights import RELEASE_URL

__all__ = ["CMT"]

# FX cannot follow what depends on the images' size or on the mode. timm's extractors keep the bias whole, so that it
# still resizes what they load.
torch.fx.wrap("attend")
register_notrace_module(RelPosBias)

MIN_SIZE = 32  # pixels: below it the last stage has no token
Layer = Callable[..., nn.Module]


@torch.fx.wrap
def check_size(x: Tensor, min_size: int = MIN_SIZE) -> Tensor:  # an argument, since TorchScript knows no globals
    """Raise ValueError for what is no batch of images, or of images too small to leave a token in the last stage."""
    if x.ndim != 4:
        raise ValueError(f"CMT takes images [B, C, H, W], not a tensor of {x.ndim} dimensions; pass image[None]")
    H, W = x.shape[-2:]
    if H < min_size or W < min_size:
        raise ValueError(f"an image of {H} x {W} pixels is too small for CMT; it takes {min_size} x {min_size} or more")
    if torch.jit.is_tracing():  # a trace is right at one size: let it fail at others
        x = x.expand(-1, -1, int(H), int(W))
    return x


def get_grid_sizes(img_size: tuple[int, int], num_stages: int = 4) -> list[tuple[int, int]]:
    """(height, width) in tokens of each stage's feature map for an image of (height, width) pixels."""
    H, W = ((size + 1) // 2 for size in img_size)  # the stem's padded stride-2 convolution rounds up
    return [(H >> i, W >> i) for i in range(1, num_stages + 1)]  # the 2 x 2 convolutions round down


class Stem(nn.Module):
    """Three 3 x 3 convolutions, the first of stride 2, each followed by GELU, then BatchNorm (section 3.1).

    [B, in_chans, H, W] -> [B, C, ceil(H / 2), ceil(W / 2)]

    Raises:
        ValueError: The image is under 32 pixels high or wide.
    """

    stride = 2

    def __init__(
        self, in_chans: int, dim: int, act_layer: LayerType, norm_layer: Layer = nn.BatchNorm2d, device=None, dtype=None
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        layers: dict[str, Any] = dict(act_layer=act_layer, norm_layer=norm_layer)
        self.conv1 = nn.Conv2d(in_chans, dim, 3, stride=2, padding=1, **dd)
        self.conv2 = ActNormConv(nn.Conv2d(dim, dim, 3, padding=1, **dd), **layers, **dd)
        self.conv3 = ActNormConv(nn.Conv2d(dim, dim, 3, padding=1, **dd), **layers, **dd)
        self.act = make_act(act_layer)
        self.norm = norm_layer(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = check_size(x)  # here, not in CMT.forward: timm's feature extractors take the model apart
        # LayerNorm2d and attention want channels-last memory. With one input channel, NCHW and NHWC strides coincide,
        # so conv1 returns NCHW; convert again.
        x = to_channels_last(self.conv1(to_channels_last(x)))
        return self.norm(self.act(self.conv3(self.conv2(x))))


class PatchAggregation(nn.Module):
    """A 2 x 2 convolution of stride 2, then LayerNorm over the channels (section 3.1).

    [B, C_in, H, W] -> [B, C, H // 2, W // 2]
    """

    def __init__(self, in_dim: int, dim: int, norm_layer: Layer = LayerNorm2d, device=None, dtype=None):
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

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x

    @torch.jit.ignore
    def fuse(self) -> nn.Conv2d:
        """One convolution that does both, for inference."""
        conv = plain_conv(self.conv)
        with torch.no_grad():
            conv.weight[:, 0, 1, 1] += 1
        return conv


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
        norm_layer: The normalisation after the reduction.

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
        norm_layer: Layer = nn.BatchNorm2d,
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

        self.q = nn.Linear(dim, dim, **dd)
        self.sr = (
            ConvNorm(dim, dim, sr_ratio, groups=dim, norm_layer=norm_layer, **dd) if sr_ratio > 1 else nn.Identity()
        )
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        B, C, H, W = x.shape
        heads, d = self.num_heads, self.head_dim
        q = self.q(x.permute(0, 2, 3, 1).flatten(1, 2))  # [B, N, C]
        kv = self.kv(self.sr(x).permute(0, 2, 3, 1).flatten(1, 2))  # [B, M, 2 * C]
        q = q.reshape(B, q.shape[1], heads, d).transpose(1, 2)  # [B, heads, N, d]
        k = kv[..., : heads * d].reshape(B, kv.shape[1], heads, d).transpose(1, 2)  # [B, heads, M, d]
        v = kv[..., heads * d :].reshape(B, kv.shape[1], heads, d).transpose(1, 2)

        bias = bias.to(q.dtype)
        if self.fused_attn:
            x = attend(q, k, v, bias, self.scale, dropout_p=self.attn_drop.p if self.attn_drop.training else 0.0)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1) + bias
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        x = self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  # [B, N, C]
        return x.reshape(B, H, W, C).permute(0, 3, 1, 2)


class InvertedResidualFFN(nn.Module):
    """IRFFN(X) = Conv(F(Conv(X))), F(X) = DWConv(X) + X (eqs. 4-5).

    [B, C, H, W] -> [B, C, H, W]

    GELU, then BatchNorm, follow the first convolution and F; BatchNorm alone follows the last.

    Args:
        dim: Channels C.
        hidden_dim: Channels between the two 1 x 1 convolutions.
        act_layer: The activation.
        drop: Dropout probability after the first BatchNorm and after the last.
        norm_layer: What stands for BatchNorm.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        act_layer: LayerType = nn.GELU,
        drop: float = 0.0,
        norm_layer: Layer = nn.BatchNorm2d,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        layers: dict[str, Any] = dict(act_layer=act_layer, norm_layer=norm_layer)
        dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.conv1 = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.dwconv = ActNormConv(dwconv, shortcut=True, drop=drop, **layers, **dd)
        self.conv2 = ActNormConv(nn.Conv2d(hidden_dim, dim, 1, **dd), **layers, **dd)
        self.norm = norm_layer(dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.conv2(self.dwconv(self.conv1(x)))))

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the last BatchNorm into the convolution before it, for inference.

        Raises:
            RuntimeError: What stands there cannot be folded.
        """
        if not isinstance(self.norm, nn.Identity):
            self.conv2.reparameterize()
            assert self.conv2.reparam_conv is not None
            fold_norm_after(self.conv2.reparam_conv, self.norm)
            self.norm = nn.Identity()


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
        lpu_layer, attn_layer, mlp_layer: The three modules.
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
        norm_layer: Layer = LayerNorm2d,
        lpu_layer: Layer = LocalPerceptionUnit,
        attn_layer: Layer = LightweightAttention,
        mlp_layer: Layer = InvertedResidualFFN,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.lpu = lpu_layer(dim, **dd)
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn_layer(dim, num_heads, sr_ratio, attn_drop=attn_drop, proj_drop=proj_drop, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.lpu(x)  # eq. 6
        x = x + self.drop_path1(self.attn(self.norm1(x), bias))  # eq. 7
        x = x + self.drop_path2(self.mlp(self.norm2(x)))  # eq. 8
        return x


class Stage(nn.Module):
    """Patch aggregation, then the stage's blocks, which share one relative position bias.

    [B, C_in, H, W] -> [B, C, H // 2, W // 2]

    Args:
        in_dim: Channels C_in.
        dim: Channels C.
        depth: Blocks.
        grid_size: (height, width) of the stage's output in tokens, at the size the model is built for.
        drop_path: Drop-path probability of each block.
        block_layer, downsample_layer: The blocks, and the patch aggregation.
        num_heads, sr_ratio: As in `Block`.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        depth: int,
        grid_size: tuple[int, int],
        num_heads: int,
        sr_ratio: int,
        drop_path: list[float],
        block_layer: Layer = Block,
        downsample_layer: Layer = PatchAggregation,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.downsample = downsample_layer(in_dim, dim, **dd)
        self.rel_pos_bias = RelPosBias(num_heads, grid_size, sr_ratio=sr_ratio, **dd)
        self.blocks = nn.ModuleList(
            block_layer(dim, num_heads, sr_ratio=sr_ratio, drop_path=drop_path[i], **dd) for i in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        bias = self.rel_pos_bias(x.shape[2], x.shape[3])
        for block in self.blocks:
            if torch.jit.is_scripting():
                x = block(x, bias)
            else:
                x = run_block(block, x, bias, checkpointing=self.grad_checkpointing)
        return x


class FinalConv(nn.Sequential):
    """A 1 x 1 convolution, BatchNorm, SiLU: the FC layer before the pooling (Table 1).

    [B, C_in, H, W] -> [B, C, H, W]
    """

    def __init__(self, in_dim: int, dim: int, norm_layer: Layer = nn.BatchNorm2d, device=None, dtype=None):
        super().__init__(ConvNorm(in_dim, dim, norm_layer=norm_layer, device=device, dtype=dtype), nn.SiLU())


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
        stem_layer: The stem; one whose `stride` is 4 takes the place of the first patch aggregation as well.
        lpu_layer, attn_layer, mlp_layer: The three modules of each block.
        final_layer, head_width: The last layer before the pooling, and its channels.
        recompute_act: In eager training, compute each GELU and BatchNorm before a convolution again in the backward
            pass. About half as much is kept for it.

    Raises:
        ValueError: An image size under 32, or a number of heads that does not divide its stage's channels.
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
        stem_layer: Layer = Stem,
        lpu_layer: Layer = LocalPerceptionUnit,
        attn_layer: Layer = LightweightAttention,
        mlp_layer: Layer = InvertedResidualFFN,
        final_layer: Layer = FinalConv,
        head_width: int = 1280,
        recompute_act: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        # Forward takes any size, although timm and its scripts build the model for the one they are asked for.
        self._traits = {"fixed_input_size": False}
        block_norm = get_norm_layer(norm_layer) or partial(LayerNorm2d, eps=1e-6)
        downsample_norm = get_norm_layer(norm_layer) or partial(LayerNorm2d, eps=1e-5)

        grid_sizes = get_grid_sizes(_check_img_size(img_size), len(depths))
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        layers: Any = dict(norm_layer=block_norm, lpu_layer=lpu_layer, attn_layer=attn_layer, mlp_layer=mlp_layer)
        layers.update(mlp_ratio=mlp_ratio, proj_drop=proj_drop_rate, attn_drop=attn_drop_rate, act_layer=act_layer)
        stage: Layer = partial(Stage, block_layer=partial(Block, **layers), **dd)
        downsample_layer = partial(PatchAggregation, norm_layer=downsample_norm)

        self.stem = stem_layer(in_chans, stem_width, act_layer=act_layer, **dd)
        stride: Any = self.stem.stride
        self.feature_info: list[dict[str, Any]] = [dict(num_chs=stem_width, reduction=stride, module="stem")]
        dims, self.stages = [stem_width, *embed_dims], nn.Sequential()
        for i in range(len(depths)):
            own: Any = dict(depth=depths[i], grid_size=grid_sizes[i], num_heads=num_heads[i], sr_ratio=sr_ratios[i])
            own.update(drop_path=drop_paths[i], downsample_layer=downsample_layer if i or stride < 4 else nn.Identity)
            self.stages.append(stage(dims[i], dims[i + 1], **own))
            self.feature_info.append(dict(num_chs=dims[i + 1], reduction=4 * 2**i, module=f"stages.{i}"))
        self.num_features = self.head_hidden_size = head_width
        self.final_conv = final_layer(dims[-1], head_width, **dd)
        self.global_pool, head = create_classifier(head_width, num_classes, pool_type=global_pool, **dd)
        self.head_drop, self.head = nn.Dropout(drop_rate), head
        for module in self.modules():
            if isinstance(module, ActNormConv):
                module.recompute = recompute_act

        self.init_weights()
        self.register_load_state_dict_pre_hook(_adapt_checkpoint)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise as the authors do."""
        named_apply(_init_weights, self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()  # the authors decay the relative position bias too

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [
            (r"^stages\.(\d+)\.(?:downsample|rel_pos_bias)", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^final_conv", (99999,)),
        ]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        stage: Any  # for torch, what lies in a Sequential is any module
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
            RuntimeError: A bias is pruned or parametrized.
        """
        img_size = _check_img_size(img_size)
        stage: Any
        for stage, grid_size in zip(self.stages, get_grid_sizes(img_size, len(self.stages))):
            stage.rel_pos_bias.set_query_size(grid_size)
        update_model_input_size(self, img_size, self.in_chans)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; the pooling stays as it is unless one is named, or a classifier needs one."""
        param = next(self.parameters())
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type or ("avg" if num_classes else "")
        dd: dict[str, Any] = {"device": param.device, "dtype": param.dtype}
        self.global_pool, self.head = create_classifier(self.head_hidden_size, num_classes, pool_type=global_pool, **dd)
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
        if 0 in take_indices:
            intermediates.append(x)
        last = max_index if stop_early else len(self.stages)
        for feat_idx, stage in enumerate(self.stages[:last], start=1):
            x = stage(x)
            if feat_idx in take_indices:
                intermediates.append(x)

        if intermediates_only:
            return intermediates
        if last == len(self.stages):
            x = self.final_conv(x)
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
            self.final_conv = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_norm or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, 1280, H / 32, W / 32], after the head's 1 x 1 convolution."""
        return self.final_conv(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, 1280, h, w] -> [B, num_classes], or [B, 1280] before the classifier if `pre_logits`."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module, name: str = "") -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")  # fan_out is not divided by the groups
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif callable(reset := getattr(module, "reset_parameters", None)):  # norms and relative position biases
        reset()


def _check_img_size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    size = to_2tuple(img_size)
    if len(size) != 2 or not all(isinstance(side, Integral) and int(side) >= MIN_SIZE for side in size):
        raise ValueError(f"img_size {img_size} is no size for CMT; it takes (height, width) of at least 32 pixels")
    return int(size[0]), int(size[1])


VARIANTS: dict[str, dict[str, Any]] = dict(
    cmt_ti=dict(stem_width=16, embed_dims=(46, 92, 184, 368), depths=(2, 2, 10, 2), mlp_ratio=3.6),
    cmt_xs=dict(stem_width=16, embed_dims=(52, 104, 208, 416), depths=(3, 3, 12, 3), mlp_ratio=3.77),
    cmt_s=dict(stem_width=32, embed_dims=(64, 128, 256, 512), depths=(3, 3, 16, 3), mlp_ratio=4.0),
    cmt_b=dict(stem_width=38, embed_dims=(76, 152, 304, 608), depths=(4, 4, 20, 4), mlp_ratio=4.0),
    cmt_l=dict(stem_width=44, embed_dims=(88, 176, 352, 704), depths=(5, 5, 25, 5), mlp_ratio=4.0),
)

SHAPES = {name: Shape(args["stem_width"], args["embed_dims"], args["depths"]) for name, args in VARIANTS.items()}


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The state dict, in our layout and at the model's size, that a checkpoint of ours or of the authors' holds.

    Raises:
        RuntimeError: It is not one of a CMT, or of another variant, or not whole.
    """
    state_dict = adapt(clean_state_dict(dict(get_weights(checkpoint))), model, SHAPES)
    missing = [n for n in model.state_dict() if not (n in state_dict or n.startswith("head.") or "num_batches" in n)]
    if missing:  # timm loads without `strict` where the classes differ, and would leave these as they are
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise RuntimeError(f"this checkpoint is not whole: it lacks {missing[0]}{more}; load one that has all weights")
    return state_dict


def _adapt_checkpoint(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before anything is loaded: misfits raise, the authors' layout becomes ours, biases get the model's size.

    torch passes strict=True to pre-hooks regardless, and raises about missing and unexpected keys only after copying.
    """
    given = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    adapted = adapt(given, model, SHAPES, is_whole=not prefix)
    refuse_misfit(adapted, model)
    for key in given:
        del state_dict[prefix + key]
    state_dict.update({prefix + key: value for key, value in adapted.items()})


def _create_cmt(variant: str, pretrained: bool = False, **kwargs) -> CMT:
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3, 4))
    model = build_model_with_cfg(
        CMT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, flatten_sequential=True),
        **dict(VARIANTS.get(variant, {}), **kwargs),
    )
    if not isinstance(model, CMT):  # timm's feature extractors, which take the model apart
        model.register_load_state_dict_pre_hook(_adapt_checkpoint)
    return model


def _cfg(size: int, file: str = "", **kwargs) -> dict[str, Any]:
    return {
        "url": f"{RELEASE_URL}/{file}" if file else "",
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
        "cmt_ti.in1k": _cfg(160, file="cmt_tiny.pth"),
        "cmt_xs.in1k": _cfg(192, file="cmt_xs.pth"),
        "cmt_s.in1k": _cfg(224, file="cmt_small.pth"),
        "cmt_b.in1k": _cfg(256, file="cmt_base.pth"),
        "cmt_l.untrained": _cfg(288),
    }
)


@register_model
def cmt_ti(pretrained: bool = False, **kwargs) -> CMT:
    """CMT-Ti, for 160 x 160 pixels."""
    return _create_cmt("cmt_ti", pretrained=pretrained, **kwargs)


@register_model
def cmt_xs(pretrained: bool = False, **kwargs) -> CMT:
    """CMT-XS, for 192 x 192 pixels."""
    return _create_cmt("cmt_xs", pretrained=pretrained, **kwargs)


@register_model
def cmt_s(pretrained: bool = False, **kwargs) -> CMT:
    """CMT-S, for 224 x 224 pixels."""
    return _create_cmt("cmt_s", pretrained=pretrained, **kwargs)


@register_model
def cmt_b(pretrained: bool = False, **kwargs) -> CMT:
    """CMT-B, for 256 x 256 pixels."""
    return _create_cmt("cmt_b", pretrained=pretrained, **kwargs)


@register_model
def cmt_l(pretrained: bool = False, **kwargs) -> CMT:
    """CMT-L, for 288 x 288 pixels. Its shape is inferred, and it has no weights.

    The paper gives 74.7 M parameters, 19.5 G multiply-adds and 84.8 top-1 at 288 x 288, and nothing else. The widths
    and depths here are the one (d; a, a, b, a) pattern with R = 4 that meets both figures.
    """
    return _create_cmt("cmt_l", pretrained=pretrained, **kwargs)
