"""torchvision's RetinaNet and Mask R-CNN on a CMT with a feature pyramid, as in Tables 12 and 13 of the paper.

    model = retinanet("cmt_s", num_classes=81, pretrained=True)
    losses = model.train()(images, targets)  # of torchvision: [3, H, W] in 0 to 1, of any sizes; boxes and labels
    boxes = model.eval()(images)

All but the backbone is torchvision's, and what its detectors take and return stands in its documentation. The heads are
those that the paper's figures fit: a pyramid of 256 channels without normalisation, for RetinaNet P3 to P7 with P6 made
from the last stage, for Mask R-CNN P2 to P6 with P6 subsampled from P5. tests/test_detection.py counts both, with CMT-S
on 1280 x 800 pixels. The paper's multiply-adds cannot hold the two matrix products of attention, which counters that
watch layers do not see.

The position bias is resized to each new image size, for 1280 x 800 pixels to 480 MB in float32.
"""

from collections.abc import Sequence
from typing import Any

import timm
from timm.models import split_model_name_tag
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from .cmt import MIN_SIZE, VARIANTS

__all__ = ["FPNBackbone", "mask_rcnn", "retinanet"]


class FPNBackbone(nn.Module):
    """Stages of a CMT and a feature pyramid on them, which any of torchvision's detectors takes as its backbone.

    [B, 3, H, W] -> {"0": [B, out_channels, h, w], "1": ...}, the finest level first, two more than stages with
    `p6_p7`, one more without.

    Args:
        model_name: A CMT model, or `hf-hub:` or `local-dir:` and where one is.
        stages: The stages, 1 to 4, of strides 4 to 32.
        p6_p7: Add two levels by convolutions of stride 2 from the last stage, as RetinaNet and FCOS have them, rather
            than one subsampled from the last level, as R-CNNs have it.
        out_channels: Channels of every level.
        model_args: More arguments of `timm.create_model`: `pretrained`, `img_size`, `drop_path_rate`, ...

    Raises:
        ValueError: `model_name` is no CMT, or `stages` are none of its.
    """

    def __init__(
        self,
        model_name: str,
        stages: Sequence[int] = (1, 2, 3, 4),
        p6_p7: bool = False,
        out_channels: int = 256,
        **model_args: Any,
    ):
        super().__init__()
        if ":" not in model_name and split_model_name_tag(model_name)[0] not in VARIANTS:
            raise ValueError(f"model_name {model_name!r} is no CMT; give one of {', '.join(VARIANTS)}")
        if not stages or list(stages) != sorted(set(stages) & {1, 2, 3, 4}):
            raise ValueError(f"stages {stages} are none of a CMT's; give some of 1, 2, 3, 4, in this order")
        self.body = timm.create_model(model_name, features_only=True, out_indices=tuple(stages), **model_args)
        info: Any = self.body.feature_info
        channels = info.channels()
        extra = LastLevelP6P7(channels[-1], out_channels) if p6_p7 else LastLevelMaxPool()
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(level): features for level, features in enumerate(self.body(x))})


def retinanet(
    model_name: str,
    num_classes: int,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    **model_args: Any,
) -> RetinaNet:
    """torchvision's RetinaNet on the stages of strides 8 to 32 of a CMT; nine anchors at each place of P3 to P7.

    Args:
        model_name: A CMT model, or `hf-hub:` or `local-dir:` and where one is.
        num_classes: Classes with the background, which is label 0, as torchvision counts them.
        min_size: Pixels that an image's shorter side is resized to; of several, one is drawn for each image in
            training, and the last is for evaluation.
        max_size: Pixels that its longer side gets at most.
        model_args: More arguments of `timm.create_model`: `pretrained`, `img_size`, `drop_path_rate`, ...

    Raises:
        ValueError: `model_name` is no CMT, there is no class beside the background, or a size is too small.
    """
    _check_arguments(num_classes, min_size, max_size)
    backbone = FPNBackbone(model_name, stages=(2, 3, 4), p6_p7=True, **model_args)
    return RetinaNet(backbone, num_classes, min_size=min_size, max_size=max_size, **_normalisation(backbone))


def mask_rcnn(
    model_name: str,
    num_classes: int,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    **model_args: Any,
) -> MaskRCNN:
    """torchvision's Mask R-CNN on the four stages of a CMT. Arguments and errors are those of `retinanet`."""
    _check_arguments(num_classes, min_size, max_size)
    backbone = FPNBackbone(model_name, **model_args)
    return MaskRCNN(backbone, num_classes, min_size=min_size, max_size=max_size, **_normalisation(backbone))


def _check_arguments(num_classes: int, min_size: int | Sequence[int], max_size: int) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes {num_classes} leaves none beside the background, which counts; give 2 or more")
    sizes = [min_size] if isinstance(min_size, int) else list(min_size)
    if not sizes or min(sizes) < MIN_SIZE:
        raise ValueError(f"min_size {min_size} is too small for CMT; give {MIN_SIZE} pixels or more")
    if max_size < max(sizes):
        raise ValueError(f"max_size {max_size} is under min_size {min_size}; give as much or more")


def _normalisation(backbone: FPNBackbone) -> dict[str, Any]:
    """The means and deviations that the backbone's weights were trained with, for as many channels as it takes.

    As timm adapts the first convolution: one channel is the mean of the three, more repeat them.
    """
    cfg: Any = backbone.body.pretrained_cfg
    channels, mean, std = cfg["input_size"][0], list(cfg["mean"]), list(cfg["std"])
    if channels == 1:
        mean, std = [sum(mean) / len(mean)], [sum(std) / len(std)]
    cycle = [i % len(mean) for i in range(channels)]
    return dict(image_mean=[mean[i] for i in cycle], image_std=[std[i] for i in cycle])
