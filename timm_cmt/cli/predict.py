"""What a model sees in pictures, as ``timm-cmt predict`` prints it."""

from pathlib import Path

import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from ..cmt import CMT
from .models import get_cfg

__all__ = ["BadPicture", "predict", "read_picture"]

BEST = 5
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # as timm's scripts read pictures for so many channels


class BadPicture(ValueError):
    """A file is no picture, or none that can be used."""


def predict(model: CMT, labels: list[str], path: Path, size: tuple[int, int] | None = None) -> list[tuple[str, float]]:
    """The likeliest classes of a picture and their probabilities, five at most, the likeliest first.

    Args:
        model: The model, for inference.
        labels: The names of its classes; [] for numbers.
        path: The picture.
        size: Height and width in pixels; the model's own if None.

    Raises:
        BadPicture: The file is no picture.
        ValueError: The model has no classifier, or takes no pictures.
    """
    if model.num_classes == 0:
        raise ValueError(f"this {get_cfg(model)['architecture']} has no classifier; name one that has")
    x = read_picture(model, path, size)[None]
    with torch.inference_mode():
        best = model(x)[0].softmax(0).topk(min(BEST, model.num_classes))
    pairs = zip(best.indices.tolist(), best.values.tolist())
    return [(labels[index] if labels else f"class {index}", probability) for index, probability in pairs]


def read_picture(model: CMT, path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """-> [C, H, W], a picture as timm prepares it for the model, the way up that a camera says.

    Raises:
        BadPicture: The file is no picture.
        ValueError: The model takes no pictures.
    """
    channels, *own_size = get_cfg(model)["input_size"]
    if channels not in MODES:
        raise ValueError(f"this model takes {channels} channels, and pictures have {', '.join(map(str, MODES))}")
    data = resolve_data_config(dict(input_size=(channels, *(size or own_size))), model=model)
    try:
        with Image.open(path) as image:
            picture = ImageOps.exif_transpose(image).convert(MODES[channels])
    except OSError as err:
        raise BadPicture(f"{path} is no picture that can be read ({err.strerror or err})") from None
    except (Image.DecompressionBombError, ValueError, SyntaxError) as err:  # what Pillow says to a huge or broken one
        raise BadPicture(f"{path} is no picture that can be read ({err})") from None
    return create_transform(**data)(picture)
