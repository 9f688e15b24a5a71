"""Six photographs that scikit-image and scikit-learn install, and the outlines of objects drawn on them by hand.

Nothing is downloaded. Astronaut (NASA), cat (Stefan van der Walt), cup (Rachel Michetti) and rocket (SpaceX) are in the
public domain or CC0; the temple (flickr.com/photos/danielbuechele) and the flower (flickr.com/photos/vultilion) are
CC BY 2.0.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import skimage
import sklearn.datasets
from matplotlib.figure import Figure
from PIL import Image

__all__ = ["CLASSES", "OUTLINES", "PHOTOGRAPHS", "make_coco", "open_photograph", "save_picture"]

# file -> (class, outline as x and y in pixels, by turns). The saucer's outline leaves out the cup and the spoon.
_DRAWN = {
    "astronaut.png": [
        (
            "person",
            "233 15 262 22 288 42 301 82 297 105 277 137 267 136 256 172 280 190 300 225 304 245 333 258 345 "
            "285 356 305 363 349 330 365 305 385 287 415 279 450 277 490 279 512 30 512 22 470 18 430 20 385 26 "
            "335 40 285 55 250 90 215 113 205 114 187 125 165 148 150 185 149 180 132 170 120 157 105 154 70 "
            "165 50 190 33 210 18",
        ),
        (
            "flag",
            "0 0 45 0 55 40 64 88 78 130 88 165 95 205 70 235 50 260 40 285 26 335 20 385 18 430 22 470 30 512 0 512",
        ),
        (
            "rocket",
            "404 0 433 0 437 38 445 40 453 58 455 130 455 235 448 240 459 262 473 276 430 285 400 288 368 280 "
            "367 265 378 236 354 226 356 208 378 180 379 120 380 60 387 42 396 46 397 20",
        ),
        (
            "helmet",
            "405 343 430 347 460 367 480 400 495 440 500 456 512 470 512 512 279 512 277 480 280 440 290 405 "
            "310 375 335 357 365 346",
        ),
    ],
    "chelsea.png": [
        (
            "cat",
            "40 0 400 0 385 15 370 50 357 75 362 120 358 160 335 200 314 220 316 255 306 280 308 300 0 300 0 "
            "125 20 122 35 110 32 70",
        ),
    ],
    "coffee.png": [
        (
            "cup",
            "173 105 180 72 200 45 235 26 285 18 335 25 375 48 400 82 409 112 400 155 386 203 365 238 345 238 "
            "322 242 317 250 332 260 310 280 285 286 258 282 235 300 218 308 203 302 196 285 200 262 215 240 "
            "200 225 183 190 175 150",
        ),
        (
            "saucer",
            "183 68 140 90 105 125 83 165 76 215 82 260 100 300 130 340 175 370 235 387 290 389 345 385 400 362 "
            "440 325 468 275 479 225 472 185 455 150 435 122 418 106 403 160 385 215 384 232 398 245 406 270 "
            "402 298 385 318 360 326 338 318 327 295 326 275 332 260 310 280 285 286 258 282 235 300 218 308 "
            "203 302 196 285 200 262 215 240 200 225 183 190 175 150 173 105",
        ),
        (
            "spoon",
            "397 72 410 66 420 68 425 75 422 90 413 125 403 160 385 215 384 232 398 245 406 270 402 298 385 318 "
            "360 326 338 318 327 295 326 275 332 260 322 258 317 250 322 242 345 238 365 238 374 225 386 203 "
            "400 155 409 112",
        ),
    ],
    "rocket.jpg": [
        (
            "rocket",
            "322 126 330 138 334 150 334 178 336 182 335 240 333 260 332 350 332 407 312 407 311 350 311 260 "
            "309 240 308 182 311 178 311 150 314 138",
        ),
    ],
    "china.jpg": [
        (
            "temple",
            "196 30 205 29 214 32 212 46 217 62 235 80 262 95 296 107 320 122 298 138 294 160 305 163 330 175 "
            "320 187 320 227 328 228 326 242 340 247 351 257 341 270 341 305 350 312 345 322 374 334 345 362 "
            "322 385 322 415 303 415 290 388 245 390 215 380 205 365 165 350 150 335 120 333 105 340 72 335 80 "
            "310 80 285 62 272 68 255 85 248 94 233 100 232 98 190 84 185 88 170 105 165 120 158 120 140 96 130 "
            "96 108 120 105 150 95 180 75 194 60 196 48",
        ),
    ],
    "flower.jpg": [
        (
            "flower",
            "315 84 340 93 370 98 390 112 410 122 427 140 428 158 435 180 445 200 446 225 440 250 433 275 418 "
            "300 405 325 380 338 350 352 325 360 295 358 250 352 225 335 202 318 185 290 175 265 169 225 170 "
            "195 177 170 188 150 200 130 215 114 240 100 268 95 290 88",
        ),
        (
            "flower",
            "287 413 290 400 300 392 325 390 335 383 348 374 362 380 372 388 392 379 408 383 425 379 440 393 "
            "441 420 455 419 475 427 297 427",
        ),
    ],
}

# file -> (class, outline as COCO has it, [x, y, x, y, ...] in pixels)
OUTLINES = {
    file: [(name, [int(number) for number in outline.split()]) for name, outline in objects]
    for file, objects in _DRAWN.items()
}

# file -> (class, (left, top, right, bottom) in pixels)
PHOTOGRAPHS = {
    file: [(name, (min(xy[::2]), min(xy[1::2]), max(xy[::2]), max(xy[1::2]))) for name, xy in objects]
    for file, objects in OUTLINES.items()
}

# Label 0 is the background.
CLASSES = ["background", *sorted({name for objects in PHOTOGRAPHS.values() for name, _ in objects})]


def make_coco() -> dict[str, list[dict[str, Any]]]:
    """The photographs and what is drawn on them in COCO's format; images and categories are numbered from 1."""
    images, annotations = [], []
    for image_id, (file, objects) in enumerate(OUTLINES.items(), 1):
        width, height = open_photograph(file).size
        images.append(dict(id=image_id, file_name=file, width=width, height=height))
        for (name, xy), (_, (left, top, right, bottom)) in zip(objects, PHOTOGRAPHS[file]):
            x, y = np.array(xy[::2]), np.array(xy[1::2])
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image_id,
                    category_id=CLASSES.index(name),
                    bbox=[left, top, right - left, bottom - top],
                    segmentation=[xy],
                    area=abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2,
                    iscrowd=0,
                )
            )
    categories = [dict(id=label, name=name) for label, name in enumerate(CLASSES) if label]
    return dict(images=images, annotations=annotations, categories=categories)


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
