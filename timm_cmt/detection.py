"""torchvision's RetinaNet and Mask R-CNN on a CMT with a feature pyramid, as in Tables 12 and 13 of the paper.

    model = retinanet("cmt_s", num_classes=81, pretrained=True)
    losses = model.train()(images, targets)  # of torchvision: [3, H, W] in 0 to 1, of any sizes; boxes and labels
    boxes = model.eval()(images)

All but the backbone is torchvision's, and what its detectors take and return stands in its documentation. The heads are
those that the paper's figures fit: a pyramid of 256 channels without normalisation, for RetinaNet P3 to P7 with P6 made
from the last stage, for Mask R-CNN P2 to P6 with P6 subsampled from P5. tests/integration/test_detection.py counts
both, with CMT-S on 1280 x 800 pixels. The paper's multiply-adds cannot hold the two matrix products of attention, which
counters that watch layers do not see.

The position bias is resized in every forward pass at another size than the model's, for 1280 x 800 pixels to 480 MB
in float32.

torchvision knows the same detectors by name (`torchvision_models`): its train.py trains them.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from timm.layers import freeze_batch_norm_2d
from timm.models import split_model_name_tag
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from .cmt import MIN_SIZE, VARIANTS
from .weights import show_progress

__all__ = ["FPNBackbone", "build_detector", "mask_rcnn", "retinanet"]

# A detector's class, and what its pyramid has.
_DETECTORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "retinanet": (RetinaNet, dict(stages=(2, 3, 4), p6_p7=True)),
    "maskrcnn": (MaskRCNN, {}),
}
_LAYERS = ("stem", "stages_0", "stages_1", "stages_2", "stages_3")


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
    return _build("retinanet", model_name, num_classes, min_size, max_size, model_args)


def mask_rcnn(
    model_name: str,
    num_classes: int,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    **model_args: Any,
) -> MaskRCNN:
    """torchvision's Mask R-CNN on the four stages of a CMT. Arguments and errors are those of `retinanet`."""
    return _build("maskrcnn", model_name, num_classes, min_size, max_size, model_args)


def build_detector(
    detector: str,
    variant: str,
    num_classes: int | None = None,
    weights_backbone: str | None = None,
    trainable_backbone_layers: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Any:
    """What torchvision's builders do, for `torchvision_models`, where arguments and errors are described.

    Args:
        detector: "retinanet" or "maskrcnn".
        variant: A CMT model.
    """
    detector_cls, pyramid = _DETECTORS[detector]
    if trainable_backbone_layers is not None and trainable_backbone_layers not in range(len(_LAYERS) + 1):
        raise ValueError(
            f"trainable_backbone_layers {trainable_backbone_layers} is not in the range; give 0 to {len(_LAYERS)}"
        )
    if weights_backbone is None:
        if trainable_backbone_layers not in (None, len(_LAYERS)):
            warnings.warn(
                f"trainable_backbone_layers {trainable_backbone_layers} has no effect without weights_backbone: the "
                "whole backbone is trained",
                stacklevel=3,
            )
        backbone = FPNBackbone(variant, **pyramid)
    else:
        model_name, source = _find_weights(variant, weights_backbone)
        with show_progress(progress):
            backbone = FPNBackbone(model_name, **pyramid, pretrained=True, **source)
        body: Any = backbone.body
        if body.pretrained_cfg["architecture"] != variant:
            raise ValueError(
                f"weights_backbone {weights_backbone} is a {body.pretrained_cfg['architecture']}; give one of {variant}"
            )
        freeze_batch_norm_2d(body)
        trainable = 3 if trainable_backbone_layers is None else trainable_backbone_layers
        for layer in _LAYERS[: len(_LAYERS) - trainable]:
            body[layer].requires_grad_(False)
    return detector_cls(backbone, 91 if num_classes is None else num_classes, **{**_normalisation(backbone), **kwargs})


def _find_weights(variant: str, weights: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments by which timm.create_model makes `variant` with these weights."""
    if weights == "in1k":
        return variant, {}
    if isinstance(weights, str) and weights.startswith(("hf-hub:", "local-dir:")):
        return weights, {}
    if isinstance(weights, (str, Path)) and Path(weights).is_dir():
        return f"local-dir:{weights}", {}
    if isinstance(weights, (str, Path)) and Path(weights).is_file():
        return variant, dict(pretrained_cfg_overlay=dict(file=str(weights)))
    raise ValueError(
        f"weights_backbone {weights} is unknown, and no file or folder; give in1k, a checkpoint's file, a folder with "
        "config.json, or hf-hub: and where it is"
    )


def _build(
    detector: str,
    model_name: str,
    num_classes: int,
    min_size: int | Sequence[int],
    max_size: int,
    model_args: dict[str, Any],
) -> Any:
    detector_cls, pyramid = _DETECTORS[detector]
    _check_arguments(num_classes, min_size, max_size)
    backbone = FPNBackbone(model_name, **pyramid, **model_args)
    return detector_cls(backbone, num_classes, min_size=min_size, max_size=max_size, **_normalisation(backbone))


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
