"""What a model sees in pictures, as ``timm-cmt predict`` prints it."""

import contextlib
from pathlib import Path

import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from ..cmt import CMT
from .models import get_cfg

__all__ = ["BadPicture", "check_classifier", "list_best", "predict", "read_picture"]

BEST = 5
MOST_SLENDER = 100  # a longer side in shorter ones; timm resizes the shorter one before it crops
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
    check_classifier(model)
    x = read_picture(model, path, size)[None]
    with torch.inference_mode():
        return list_best(model(x)[0], labels)


def check_classifier(model: CMT) -> None:
    """Raise ValueError if a model has no classifier, or takes no pictures."""
    if model.num_classes == 0:
        raise ValueError(f"this {get_cfg(model)['architecture']} has no classifier; name one that has")
    _get_mode(model)


def list_best(logits: Tensor, labels: list[str]) -> list[tuple[str, float]]:
    """The likeliest classes by logits, [classes], and their probabilities, five at most, the likeliest first."""
    best = logits.softmax(0).topk(min(BEST, len(logits)))
    pairs = zip(best.indices.tolist(), best.values.tolist())
    return [(labels[index] if labels else f"class {index}", probability) for index, probability in pairs]


def read_picture(
    model: CMT, path: Path, size: tuple[int, int] | None = None, formats: tuple[str, ...] | None = None
) -> Tensor:
    """-> [C, H, W], a picture as timm prepares it for the model, the way up that a camera says.

    Args:
        model: The model.
        path: The picture.
        size: Height and width in pixels; the model's own if None.
        formats: The formats that the picture may have, as Pillow calls them; all of Pillow's if None.

    Raises:
        BadPicture: The file is no picture.
        ValueError: The model takes no pictures.
    """
    channels, *own_size = get_cfg(model)["input_size"]
    mode = _get_mode(model)
    data = resolve_data_config(dict(input_size=(channels, *(size or own_size))), model=model)
    try:
        with Image.open(path, formats=formats) as image:
            if max(image.size) > MOST_SLENDER * min(image.size):
                raise ValueError(f"{image.width} x {image.height} pixels are a line; cut a piece out of it")
            image.load()
            with contextlib.suppress(Exception):  # the pixels are whole where what a camera noted is not
                ImageOps.exif_transpose(image, in_place=True)
            picture = image.convert(mode)
    except OSError as err:
        raise BadPicture(f"{path} is no picture that can be read ({err.strerror or err})") from None
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000  # Pillow warns at once as many, and refuses at twice
        raise BadPicture(f"{path} has more than {most} million pixels; make it smaller") from None
    except Exception as err:  # Pillow has others, too, for broken ones
        raise BadPicture(f"{path} is no picture that can be read ({err})") from None
    return create_transform(**data)(picture)


def _get_mode(model: CMT) -> str:
    """How Pillow calls pictures with the model's channels."""
    channels = get_cfg(model)["input_size"][0]
    if channels not in MODES:
        raise ValueError(f"this model takes {channels} channels, and pictures have {', '.join(map(str, MODES))}")
    return MODES[channels]
