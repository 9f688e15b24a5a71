"""Six photographs that scikit-image and scikit-learn install, and boxes drawn on them by hand.

Nothing is downloaded. Astronaut (NASA), cat (Stefan van der Walt), cup (Rachel Michetti) and rocket (SpaceX) are in the
public domain or CC0; the temple (flickr.com/photos/danielbuechele) and the flower (flickr.com/photos/vultilion) are
CC BY 2.0.
"""

import io
from pathlib import Path

import skimage
import sklearn.datasets
from matplotlib.figure import Figure
from PIL import Image

__all__ = ["CLASSES", "PHOTOGRAPHS", "open_photograph", "save_picture"]

# file -> (class, (left, top, right, bottom) in pixels)
PHOTOGRAPHS = {
    "astronaut.png": [
        ("person", (18, 15, 363, 512)),
        ("flag", (0, 0, 95, 512)),
        ("rocket", (354, 0, 473, 288)),
        ("helmet", (277, 343, 512, 512)),
    ],
    "chelsea.png": [("cat", (0, 0, 400, 300))],
    "coffee.png": [
        ("cup", (173, 18, 409, 308)),
        ("saucer", (76, 68, 479, 389)),
        ("spoon", (317, 66, 425, 326)),
    ],
    "rocket.jpg": [("rocket", (308, 126, 336, 407))],
    "china.jpg": [("temple", (62, 29, 374, 415))],
    "flower.jpg": [("flower", (169, 84, 446, 360)), ("flower", (287, 374, 475, 427))],
}

# Label 0 is the background.
CLASSES = ["background", *sorted({name for objects in PHOTOGRAPHS.values() for name, _ in objects})]


def open_photograph(file: str) -> Image.Image:
    folders = Path(skimage.__file__).parent / "data", Path(sklearn.datasets.__file__).parent / "images"
    path = next(folder / file for folder in folders if (folder / file).is_file())
    return Image.open(path).convert("RGB")


def save_picture(figure: Figure, path: Path) -> None:
    """Save a figure as a PNG of 256 colours, a third of the size; never half of it."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100, format="png", bbox_inches="tight", pad_inches=0.05)
    image = Image.open(picture).convert("RGB")
    palette = image.quantize()  # dithers only towards a palette that it is given
    part = path.with_name(f"{path.name}.part")
    try:
        image.quantize(palette=palette).save(part, format="png", optimize=True)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
