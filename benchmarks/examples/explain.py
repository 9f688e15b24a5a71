"""Grad-CAM of a CMT: what in one photograph speaks for each of several classes.

The model is trained here, from random weights, to tag random crops of six photographs with the objects in them; it has
never been told where they are. The photograph explained is one of the six, as a whole.
Run: python benchmarks/examples/explain.py [--model cmt_ti] [--steps 120] [--out gradcam.png]
"""

import argparse
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from photographs import CLASSES, PHOTOGRAPHS, open_photograph, save_picture
from PIL import Image
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from timm.data import create_transform
from torch import Tensor
from tqdm import tqdm

FILE = "astronaut.png"
TAGS = CLASSES[1:]  # without the background
VISIBLE = 0.3  # part of an object's box that a crop must show to be tagged with it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cmt_ti")
    parser.add_argument("--crop", type=int, default=64, help="pixels of a crop's side")
    parser.add_argument("--size", type=int, default=160, help="pixels of the side of the photograph explained")
    parser.add_argument("--steps", type=int, default=120, help="training steps, each on 32 crops")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("gradcam.png"))
    args = parser.parse_args()

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    photographs = {file: open_photograph(file) for file in PHOTOGRAPHS}
    model = timm.create_model(args.model, img_size=args.crop, num_classes=len(TAGS))
    transform = create_transform((3, args.crop, args.crop), crop_pct=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.1)
    model.train()
    bar = tqdm(range(args.steps), unit="step")
    for _ in bar:
        crops = [draw_crop(rng, photographs) for _ in range(32)]
        images = torch.stack([transform(crop) for crop, _ in crops])
        loss = F.binary_cross_entropy_with_logits(model(images), torch.stack([tags for _, tags in crops]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")

    photograph = photographs[FILE].resize((args.size, args.size), Image.Resampling.BICUBIC)
    image = create_transform((3, args.size, args.size), crop_pct=1.0)(photograph)[None]
    model.eval()
    with torch.inference_mode():
        probabilities = model(image).sigmoid()[0]
    figure = Figure(figsize=(12, 3.3), layout="constrained")
    axes = figure.subplots(1, 1 + len(PHOTOGRAPHS[FILE]))
    axes[0].imshow(photograph)
    axes[0].set_title("photograph", fontsize=9)
    with GradCAM(model, target_layers=[model.stages[-1]]) as cam:
        for ax, (name, box) in zip(axes[1:], PHOTOGRAPHS[FILE]):
            tag = TAGS.index(name)
            heat = cam(image, targets=[ClassifierOutputTarget(tag)])[0]  # [size, size], 0 to 1
            left, top, right, bottom = (round(edge * args.size / photographs[FILE].width) for edge in box)
            share, area = heat[top:bottom, left:right].sum() / heat.sum(), (right - left) * (bottom - top) / heat.size
            where = f"{share:.0%} of its map in its box, which is {area:.0%} of the picture"
            print(f"{name} {probabilities[tag]:.2f}: {where}")
            ax.imshow(show_cam_on_image(np.asarray(photograph) / np.float32(255), heat, use_rgb=True))
            ax.set_title(f"{name} {probabilities[tag]:.2f}", fontsize=9)
    for ax in axes:
        ax.axis("off")
    save_picture(figure, args.out)
    print(args.out)


def draw_crop(rng: np.random.Generator, photographs: dict[str, Image.Image]) -> tuple[Image.Image, Tensor]:
    """A random square about a place in a random object, and for each tag 1 if the object is in it, 0 else."""
    places = [(file, box) for file, objects in PHOTOGRAPHS.items() for _, box in objects]
    file, box = places[rng.integers(len(places))]
    width, height = photographs[file].size
    side = int(rng.uniform(0.3, 0.7) * min(width, height))
    left = int(np.clip(rng.uniform(box[0], box[2]) - rng.uniform(0, side), 0, width - side))
    top = int(np.clip(rng.uniform(box[1], box[3]) - rng.uniform(0, side), 0, height - side))
    tags = torch.zeros(len(TAGS))
    for name, box in PHOTOGRAPHS[file]:
        shown_width = min(box[2], left + side) - max(box[0], left)
        shown_height = min(box[3], top + side) - max(box[1], top)
        shown = max(shown_width, 0) * max(shown_height, 0)
        # All of an object that is larger than the crop cannot be seen: then the crop must lie in it.
        if shown >= VISIBLE * min((box[2] - box[0]) * (box[3] - box[1]), side * side):
            tags[TAGS.index(name)] = 1
    return photographs[file].crop((left, top, left + side, top + side)), tags


if __name__ == "__main__":
    main()
