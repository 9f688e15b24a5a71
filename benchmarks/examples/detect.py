"""Train RetinaNet on a CMT, from random weights, until it finds the objects in six photographs, and draw its boxes.

It is tested on the photographs that it was trained on: this shows that a detector on a CMT learns, and nothing about
others. Run: python benchmarks/examples/detect.py [--model cmt_ti] [--size 128] [--steps 100] [--out boxes.png]
"""

import argparse
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from photographs import CLASSES, PHOTOGRAPHS, open_photograph, save_picture
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.v2.functional import pil_to_tensor, to_dtype
from tqdm import tqdm

from timm_cmt.detection import retinanet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cmt_ti")
    parser.add_argument("--size", type=int, default=128, help="pixels of an image's shorter side")
    parser.add_argument("--steps", type=int, default=100, help="training steps, each on all six photographs")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("boxes.png"))
    args = parser.parse_args()

    torch.manual_seed(0)
    images = [to_dtype(pil_to_tensor(open_photograph(file)), torch.float32, scale=True) for file in PHOTOGRAPHS]
    targets = [
        dict(
            boxes=torch.tensor([box for _, box in objects], dtype=torch.float32),
            labels=torch.tensor([CLASSES.index(name) for name, _ in objects]),
        )
        for objects in PHOTOGRAPHS.values()
    ]
    images = [image.to(args.device) for image in images]
    targets = [{key: value.to(args.device) for key, value in target.items()} for target in targets]

    model = retinanet(args.model, len(CLASSES), min_size=args.size, max_size=2 * args.size, img_size=args.size)
    model.to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.1)
    model.train()
    bar = tqdm(range(args.steps), unit="step")
    for _ in bar:
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")

    with torch.inference_mode():
        found = [keep_certain(output) for output in model.eval()(images)]
    best = [best_overlaps(target, output) for target, output in zip(targets, found)]
    for file, overlaps, output in zip(PHOTOGRAPHS, best, found):
        names = [name for name, _ in PHOTOGRAPHS[file]]
        print(f"{file}: {len(output['boxes'])} boxes;", *(f"{n} {o:.2f}" for n, o in zip(names, overlaps)))
    overlaps = torch.cat(best)
    print(f"{int((overlaps > 0.5).sum())} of {len(overlaps)} objects found, mean overlap {overlaps.mean():.3f}")
    draw(targets, found, args.out)
    print(args.out)


def keep_certain(output: dict[str, Tensor], score: float = 0.5) -> dict[str, Tensor]:
    """The boxes with a score of at least `score`, on the CPU."""
    keep = output["scores"] >= score
    return {key: value[keep].cpu() for key, value in output.items()}


def best_overlaps(target: dict[str, Tensor], output: dict[str, Tensor]) -> Tensor:
    """-> [N], for each of N true boxes its largest intersection over union with a found box of its class, 0 if none."""
    overlaps = box_iou(target["boxes"].cpu(), output["boxes"])
    overlaps[target["labels"].cpu()[:, None] != output["labels"]] = 0
    return torch.cat([overlaps, torch.zeros(len(overlaps), 1)], dim=1).amax(dim=1)


def draw(targets: list[dict[str, Tensor]], found: list[dict[str, Tensor]], path: Path) -> None:
    """Draw each photograph twice, with the true boxes on the left and the found ones, with scores, on the right."""
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    axes = figure.subplots(3, 4).reshape(6, 2)
    for file, target, output, (left, right) in zip(PHOTOGRAPHS, targets, found, axes):
        draw_boxes(left, file, target, "drawn by hand")
        draw_boxes(right, file, output, "found")
    save_picture(figure, path)


def draw_boxes(axes: Axes, file: str, boxes: dict[str, Tensor], title: str) -> None:
    axes.imshow(open_photograph(file))
    axes.set_title(title, fontsize=8)
    axes.axis("off")
    scores = boxes.get("scores", [None] * len(boxes["labels"]))
    for (left, top, right, bottom), label, score in zip(boxes["boxes"].tolist(), boxes["labels"].tolist(), scores):
        color = f"C{label % 10}"
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=color, linewidth=1.5))
        text = CLASSES[label] if score is None else f"{CLASSES[label]} {score:.2f}"
        axes.text(left + 5, top + 5, text, va="top", fontsize=7, color="white", bbox=dict(facecolor=color, lw=0, pad=1))


if __name__ == "__main__":
    main()
