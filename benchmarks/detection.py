"""What one training step of RetinaNet takes on a CMT, on torchvision's ResNet-50, and on the CMT without its bias.

Kept is what a forward pass holds for the backward pass. The peak is that of the first step of a process of its own,
over what was there before (see memory.py). The time is that of the second step, the median over the rounds, in each of
which all models have their turn. "without bias" adds a zero for each head in its place: what it saves is what resizing,
adding and training the bias take. No layer is frozen, and no weights are loaded.
Run: python benchmarks/detection.py [--model cmt_s] [--size 800 1333] [--batch-size 2] [--rounds 3] [--json FILE]
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torchvision
from memory import find_saved, measure_peak
from throughput import describe
from tqdm import tqdm

from timm_cmt.cmt import VARIANTS
from timm_cmt.rel_pos_bias import RelPosBias

FIGURES = {
    "peak_mb": "peak, MB",
    "kept_mb": "kept, MB",
    "bias_mb": "resized bias, MB",
    "seconds": "step, s",
}


def measure(name: str, way: str, size: tuple[int, int], batch: int, device: str) -> dict[str, float]:
    """One process: its figures, by the keys of `FIGURES`."""
    torch.manual_seed(0)
    sizes = dict(min_size=min(size), max_size=max(size))
    # train.py's number of classes on COCO
    model = torchvision.models.get_model(f"retinanet_{name}_fpn", num_classes=91, weights_backbone=None, **sizes)
    model.to(device).train()
    if way == "checkpointing":
        model.backbone.body.set_grad_checkpointing()
    biases: list[int] = []  # bytes; to hold the tensors would change what is measured
    for module in model.modules():
        if isinstance(module, RelPosBias):
            if way == "without bias":
                module.forward = make_zeros(module)
            else:
                module.register_forward_hook(lambda module, inputs, bias: biases.append(4 * bias.numel()))
    images = [torch.rand(3, *size, device=device) for _ in range(batch)]
    corners = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.3, 0.4, 0.9, 0.9]], device=device)
    boxes = corners * torch.tensor([size[1], size[0]] * 2, device=device)
    targets = [dict(boxes=boxes, labels=torch.tensor([1, 2], device=device)) for _ in images]

    def step() -> None:
        sum(model(images, targets).values()).backward()
        model.zero_grad()
        biases.clear()
        if device == "cuda":
            torch.cuda.synchronize()

    peak = measure_peak(step, device)
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    kept = sum(find_saved(model, images, targets).values())
    in_bytes = dict(peak_mb=peak, kept_mb=kept, bias_mb=sum(biases))
    return {**{key: round(value / 2**20, 1) for key, value in in_bytes.items()}, "seconds": seconds}


def make_zeros(module: RelPosBias):
    zeros = torch.zeros(1, module.weight.shape[0], 1, 1, device=module.weight.device)
    return lambda height, width: zeros


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cmt_s", choices=VARIANTS)
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1333], metavar=("H", "W"), help="pixels")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()

    ways = [(args.model, "as it is"), (args.model, "without bias"), (args.model, "checkpointing")]
    keys = [*ways, ("resnet50", "as it is")]
    rows = {key: [] for key in keys}
    for name, way in tqdm(keys * args.rounds, unit="model"):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            arguments = name, way, tuple(args.size), args.batch_size, args.device
            rows[name, way].append(fresh.submit(measure, *arguments).result())
    figures = {key: {name: statistics.median(row[name] for row in rows[key]) for name in FIGURES} for key in keys}

    height, width = args.size
    print(f"\nRetinaNet, batch {args.batch_size}, {height} x {width}, float32, {describe(args.device)}\n")
    print(f"| backbone | {' | '.join(FIGURES.values())} |\n|---|{'---|' * len(FIGURES)}")
    for (name, way), row in figures.items():
        label = name if way == "as it is" else f"{name}, {way}"
        cells = [f"{row[key]:.{2 if key == 'seconds' else 0}f}" for key in FIGURES]
        print(f"| {label} | {' | '.join(cells)} |")
    if args.json:
        result = dict(
            vars(args),
            machine=describe(args.device),
            torch=torch.__version__,
            rows=[dict(model=name, way=way, **row, rounds=rows[name, way]) for (name, way), row in figures.items()],
        )
        part = args.json.with_name(f"{args.json.name}.part")
        part.write_text(json.dumps(result, default=str, indent=1) + "\n")
        os.replace(part, args.json)


if __name__ == "__main__":
    main()
