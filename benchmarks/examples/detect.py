"""Train RetinaNet and Mask R-CNN on a CMT on six photographs, measure COCO's mAP, and draw what they find.

They start from random weights, and are tested on the photographs that they were trained on: this shows that a detector
on a CMT learns all that its targets say, and nothing about other photographs.
Run: python benchmarks/examples/detect.py [--model cmt_ti] [--size 128] [--steps 200] [--out detections.png]
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torchvision
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from photographs import CLASSES, PHOTOGRAPHS, make_coco, open_photograph, save_picture
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor, to_dtype
from tqdm import tqdm

# Mask R-CNN's heads see so many places of an image in training. With the 512 of COCO a step takes ten times as long.
ARGUMENTS = {"maskrcnn": dict(box_batch_size_per_image=32, rpn_post_nms_top_n_train=200)}
TITLES = {"retinanet": "RetinaNet", "maskrcnn": "Mask R-CNN"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cmt_ti")
    parser.add_argument("--detectors", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--size", type=int, default=128, help="pixels of an image's shorter side")
    parser.add_argument("--steps", type=int, default=200, help="training steps, each on all six photographs")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("detections.png"))
    args = parser.parse_args()

    coco = COCO()
    coco.dataset = make_coco()
    coco.createIndex()
    images = [to_dtype(pil_to_tensor(open_photograph(file)), torch.float32, scale=True) for file in PHOTOGRAPHS]
    images = [image.to(args.device) for image in images]
    targets = [make_target(coco, image_id) for image_id in coco.getImgIds()]
    found = {}
    for detector in args.detectors:
        torch.manual_seed(0)
        sizes = dict(min_size=args.size, max_size=2 * args.size)
        model = torchvision.models.get_model(
            f"{detector}_{args.model}_fpn", num_classes=len(CLASSES), **sizes, **ARGUMENTS.get(detector, {})
        )
        train(model.to(args.device), images, targets, args.steps, args.lr, TITLES[detector])
        with torch.inference_mode():
            outputs = model.eval()(images)
        found[TITLES[detector]] = outputs = [{key: value.cpu() for key, value in output.items()} for output in outputs]
        for kind in ("bbox", "segm") if "masks" in outputs[0] else ("bbox",):
            print(f"{TITLES[detector]}, {'boxes' if kind == 'bbox' else 'masks'}:")
            measure(coco, outputs, kind)
    draw(targets, found, args.out)
    print(args.out)


def make_target(coco: COCO, image_id: int) -> dict[str, Tensor]:
    """What is drawn by hand on one photograph, as torchvision's detectors take it."""
    annotations = coco.imgToAnns[image_id]
    boxes = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float32)
    boxes[:, 2:] += boxes[:, :2]
    masks = np.stack([coco.annToMask(annotation) for annotation in annotations])
    labels = torch.tensor([annotation["category_id"] for annotation in annotations])
    return dict(boxes=boxes, labels=labels, masks=torch.from_numpy(masks))


def train(
    model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]], steps: int, lr: float, title: str
) -> None:
    targets = [{key: value.to(images[0].device) for key, value in target.items()} for target in targets]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    model.train()
    bar = tqdm(range(steps), desc=title, unit="step")
    for _ in bar:
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def measure(coco: COCO, outputs: list[dict[str, Tensor]], kind: str) -> None:
    """Print COCO's table for boxes ("bbox") or masks ("segm")."""
    results = []
    for image_id, output in zip(coco.getImgIds(), outputs):
        boxes = output["boxes"].clone()
        boxes[:, 2:] -= boxes[:, :2]
        for i, (label, score) in enumerate(zip(output["labels"].tolist(), output["scores"].tolist())):
            result = dict(image_id=image_id, category_id=label, score=score)
            if kind == "bbox":
                result["bbox"] = boxes[i].tolist()
            else:
                mask = (output["masks"][i, 0] > 0.5).numpy().astype(np.uint8)
                result["segmentation"] = coco_mask.encode(np.asfortranarray(mask))
            results.append(result)
    evaluation = COCOeval(coco, coco.loadRes(results) if results else COCO(), kind)  # loadRes takes no empty list
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()


def draw(targets: list[dict[str, Tensor]], found: dict[str, list[dict[str, Tensor]]], path: Path) -> None:
    """Draw each photograph with what is drawn by hand, and beside it what each detector is sure of."""
    columns = {"drawn by hand": targets, **found}
    figure = Figure(figsize=(3.1 * len(columns), 13.4), layout="constrained")
    for row, (axes, file) in enumerate(zip(figure.subplots(len(PHOTOGRAPHS), len(columns)), PHOTOGRAPHS)):
        for ax, (title, outputs) in zip(axes, columns.items()):
            draw_objects(ax, file, outputs[row], title)
    save_picture(figure, path)


def draw_objects(axes: Axes, file: str, output: dict[str, Tensor], title: str, certain: float = 0.5) -> None:
    axes.imshow(open_photograph(file))
    axes.set_title(title, fontsize=8)
    axes.axis("off")
    scores = output.get("scores", torch.ones(len(output["labels"])))
    for i in range(len(scores)):
        if scores[i] < certain:
            continue
        color = f"C{int(output['labels'][i]) % 10}"
        if "masks" in output:
            mask = output["masks"][i].squeeze(0) > 0.5
            axes.imshow(np.dstack([*(np.full(mask.shape, channel) for channel in to_rgb(color)), 0.45 * mask.numpy()]))
        left, top, right, bottom = output["boxes"][i].tolist()
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=color, linewidth=1.5))
        text = CLASSES[output["labels"][i]] + (f" {scores[i]:.2f}" if "scores" in output else "")
        axes.text(left + 5, top + 5, text, va="top", fontsize=7, color="white", bbox=dict(facecolor=color, lw=0, pad=1))


if __name__ == "__main__":
    main()
