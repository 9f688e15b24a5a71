"""CMT's detectors under torchvision's names: torchvision.models.get_model("retinanet_cmt_s_fpn", num_classes=91).

Imported with torchvision, which this must not slow down: timm and `detection` are imported when a detector is built.
torchvision has no public function that registers a model, and none of its public names is the class of its weights.
This is the one place that uses the private ones, which have been the same since torchvision 0.14. In a torchvision that
has none of them no detector is registered.
"""

from collections.abc import Callable
from typing import Any

__all__: list[str] = []  # torchvision.models.get_model has them

_VARIANTS = ("cmt_ti", "cmt_xs", "cmt_s", "cmt_b", "cmt_l")  # as in cmt.py, which imports timm
_DETECTORS = {"retinanet": "RetinaNet", "maskrcnn": "Mask R-CNN"}
# The sizes of the paper's 3x schedule. Training draws one for each image; the last is for evaluation.
_SIZES = {"": {}, "_ms": dict(min_size=tuple(range(640, 801)))}


def _make_builder(
    name: str, detector: str, variant: str, sizes: dict[str, Any], weights_enum: Any
) -> Callable[..., Any]:
    def build(
        *,
        weights: weights_enum | None = None,  # type: ignore[valid-type]
        progress: bool = True,
        num_classes: int | None = None,
        weights_backbone: str | None = None,
        trainable_backbone_layers: int | None = None,
        **kwargs: Any,
    ) -> Any:
        from .detection import build_detector

        if weights is not None:
            raise ValueError(f"weights {weights!r} is unknown: no weights of {name} have been released; leave it out")
        return build_detector(
            detector, variant, num_classes, weights_backbone, trainable_backbone_layers, progress, **{**sizes, **kwargs}
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{_DETECTORS[detector]} on {variant} and a feature pyramid, as torchvision's builders.

    Args:
        weights: None: no trained ones have been released.
        progress: Show a bar where the backbone's weights are downloaded.
        num_classes: Classes with the background; 91, COCO's, if None.
        weights_backbone: The backbone's weights: "in1k", the authors' of ImageNet; a folder that `timm-cmt convert`
            wrote; "hf-hub:ORG/NAME"; a checkpoint's file, which does not say mean and deviation: ImageNet's are taken.
            None for random ones. With weights, BatchNorm is frozen.
        trainable_backbone_layers: How many of stem and stages, 0 to 5, are trained, counted from the last stage; 3 if
            None. Without weights all are.
        kwargs: Arguments of torchvision's {_DETECTORS[detector].replace(" ", "").replace("-", "")}.

    Raises:
        ValueError: Something is unknown or out of range.
        FileNotFoundError, RuntimeError: The backbone's weights are not there, not whole, or of another network.
    """
    return build


def _register() -> None:
    try:
        from torchvision.models._api import WeightsEnum, list_models, register_model
    except ImportError:
        return

    class CMTDetectionWeights(WeightsEnum):  # type: ignore[misc]
        """None have been released. torchvision.models.get_model_weights finds this by the builders' annotations."""

    taken = set(list_models())
    for detector in _DETECTORS:
        for variant in _VARIANTS:
            for suffix, sizes in _SIZES.items():
                name = f"{detector}_{variant}_fpn{suffix}"
                if name not in taken:  # by torchvision itself one day, or by this file before a reload
                    register_model(name)(_make_builder(name, detector, variant, sizes, CMTDetectionWeights))


_register()
