"""8 bits against float32, in onnxruntime, OpenVINO and torch: size, images per second, and what it costs in accuracy.

Accuracy is of the demo's CMT-Ti, on the digits that it has not seen: top-1, and how far it agrees with float32 there
and on crops of photographs, which it was not calibrated on. Size and speed are of --model, whose weights are random and
whose BatchNorms have the statistics of such crops. Files are as `timm-cmt export` writes them; torch's 8 bits are by
torchao. Every round times each run once; printed are medians, and the median of the rounds' ratios to float32 in the
same runtime.
Run: python benchmarks/quantization.py [--demo FOLDER_OF_TIMM-CMT_DEMO] [--model cmt_s] [--rounds 21]
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
from examples.photographs import PHOTOGRAPHS, open_photograph
from throughput import describe, load_runtime
from timm.utils import reparameterize_model
from torch import Tensor, nn
from tqdm import tqdm

from timm_cmt.cli import quantize
from timm_cmt.cli.demo import run_demo
from timm_cmt.cli.export import FORMATS, INT8, export, quiet, trace
from timm_cmt.cli.models import get_cfg
from timm_cmt.cli.opened import open_model
from timm_cmt.cli.predict import read_picture

RUNTIMES = {"onnxruntime": ("onnx", ".onnx"), "openvino": ("openvino", ".xml"), "torch": ("torch", ".pt2")}
RUNS = [  # runtime, file, type of what is in float
    ("onnxruntime", "float32", "float32"),
    ("onnxruntime", "int8", "float32"),
    ("openvino", "float32", "float32"),
    ("openvino", "float32", "bfloat16"),
    ("openvino", "int8", "float32"),
    ("openvino", "int8", "bfloat16"),
    ("torch", "float32", "float32"),
    ("torch", "int8", "float32"),
]
Run = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, help="what `timm-cmt demo` wrote (default: train it, some minutes)")
    parser.add_argument("--model", default="cmt_s", help="whose size and speed are measured (default: %(default)s)")
    parser.add_argument("--size", type=int, help="of its images (default: its own)")
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument("--pictures", type=int, default=200, help="to calibrate the demo's model on, and to compare on")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    formats = [RUNTIMES[runtime][0] for runtime in args.runtimes]
    packages = {name for to in formats for name in [*FORMATS[to][1], *INT8.get(to, ["torchao"])]}
    missing = sorted(name for name in packages if importlib.util.find_spec(name) is None)
    if missing:
        parser.error(f"what is measured here is not installed; pip install {' '.join(missing)}")
    runs = [run for run in RUNS if run[0] in args.runtimes]
    torch._inductor.config.freezing = True  # or inductor computes with 8 bits by way of float32

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        demo = args.demo or work / "demo"
        if not args.demo:
            run_demo(demo)
        accuracy = measure_accuracy(demo, runs, args.pictures, work, args.batch_size)
        quantize.LEAST_CORRELATION = -1.0  # what random weights answer means nothing
        torch.manual_seed(0)
        model = timm.create_model(args.model, **(dict(img_size=args.size) if args.size else {}))
        height = get_cfg(model)["input_size"][1]
        crops = write_crops(work / "crops", 16, height)
        settle(model, torch.stack([read_picture(model, path) for path in crops]))
        sizes, loaded = write_and_load(model, runs, crops, work, args.batch_size)
        seconds = time_runs(loaded, torch.randn(args.batch_size, *get_cfg(model)["input_size"]), args.rounds)

    rows = []
    for run in runs:
        plain = run[0], "float32", "float32"
        ratio = statistics.median(a / b for a, b in zip(seconds[plain], seconds[run]))
        rows.append(
            dict(
                runtime=run[0],
                file=run[1],
                float_type=run[2],
                mb=round(sizes[run] / 1e6, 2),
                share=round(sizes[run] / sizes[plain], 3),
                images_per_second=round(args.batch_size / statistics.median(seconds[run]), 2),
                ratio=round(ratio, 2),
                **accuracy[run],
            )
        )
    machine = describe("cpu")
    print(f"\n{machine}, torch {torch.__version__}, medians of {args.rounds} rounds; ratios to float32 in the runtime")
    print(f"size and speed are of {args.model} at {height}, batch {args.batch_size}")
    print("top-1 in % and agreement with float32 (same class; correlation of logits) are of the demo's CMT-Ti\n")
    titles = ["runtime", "file", "float is", "MB", "share", "images/s", "ratio", "top-1 on digits", "agreement there"]
    titles += ["agreement on photographs", "MB of CMT-Ti", "share"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for row in rows:
        there, photos = ("{:.1f} %; {:.4f}".format(*row[name]) for name in ("on_digits", "on_photographs"))
        cells = [row[name] for name in ("runtime", "file", "float_type", "mb", "share", "images_per_second", "ratio")]
        cells += [f"{row['top1']:.2f}", there, photos, row["demo_mb"], row["demo_share"]]
        print(f"| {' | '.join(map(str, cells))} |")
    if args.json:
        part = args.json.with_name(f"{args.json.name}.part")
        versions = {name: importlib.import_module(name).__version__ for name in sorted(packages)}
        result = dict(vars(args), machine=machine, torch=torch.__version__, versions=versions, rows=rows)
        part.write_text(json.dumps(result, default=str, indent=1) + "\n")
        part.replace(args.json)


def measure_accuracy(demo: Path, runs: Sequence[tuple], count: int, work: Path, batch_size: int) -> dict[tuple, dict]:
    """Of each run, of the demo's model: top-1 on the held-out digits, and agreement with the model itself."""
    model, _ = open_model(str(demo / "last.pth.tar" if demo.is_dir() else demo))
    digits = (demo if demo.is_dir() else demo.parent) / "digits"
    calibration = work / "calibration"
    calibration.mkdir()
    for path in quantize.find_pictures(digits / "train", count):
        (calibration / f"{path.parent.name}-{path.name}").symlink_to(path.resolve())
    sizes, loaded = write_and_load(model, runs, sorted(calibration.iterdir()), work, batch_size)
    held_out = sorted((digits / "validation").rglob("*.png"))
    labels = torch.tensor([int(path.parent.name) for path in held_out])
    photographs = write_crops(work / "photographs", count, get_cfg(model)["input_size"][1])
    batches = [torch.stack([read_picture(model, path) for path in paths]) for paths in (held_out, photographs)]
    with torch.no_grad():
        expected = [model(x) for x in batches]
    measured = {}
    for key, run in tqdm(loaded.items(), desc="accuracy", unit="run"):
        actual = [run(x) for x in batches]
        agreements = []
        for a, b in zip(actual, expected):
            same, correlation = quantize.measure_agreement(b, a)
            agreements.append((round(100 * same, 2), round(correlation, 5)))
        measured[key] = dict(
            top1=round(100 * (actual[0].argmax(1) == labels).float().mean().item(), 2),
            on_digits=agreements[0],
            on_photographs=agreements[1],
            demo_mb=round(sizes[key] / 1e6, 2),
            demo_share=round(sizes[key] / sizes[(key[0], "float32", "float32")], 3),
        )
    return measured


def write_crops(folder: Path, count: int, size: int) -> list[Path]:
    """`count` square crops of the six photographs, of random places and sizes, as files."""
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    pictures = [open_photograph(file) for file in PHOTOGRAPHS]
    for i in range(count):
        picture = pictures[i % len(pictures)]
        share, left, top = torch.rand(3, generator=random).tolist()
        side = round(min(picture.size) * (0.3 + 0.7 * share))
        left, top = round((picture.width - side) * left), round((picture.height - side) * top)
        picture.crop((left, top, left + side, top + side)).resize((size, size)).save(folder / f"{i:04}.png")
    return sorted(folder.iterdir())


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> None:
    """Give BatchNorms the statistics of a batch, so that activations are of sane sizes."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()(x)
    model.eval()


@torch.no_grad()
def write_and_load(
    model: nn.Module, runs: Sequence[tuple], pictures: Sequence[Path], work: Path, batch_size: int
) -> tuple[dict[tuple, int], dict[tuple, Run]]:
    """Bytes of each run's file, and the file as its runtime runs it."""
    folder = Path(tempfile.mkdtemp(dir=work))
    sizes, loaded = {}, {}
    for run in tqdm(runs, desc="writing", unit="file"):
        runtime, bits, dtype = run
        to, suffix = RUNTIMES[runtime]
        path = folder / f"{runtime}-{bits}{suffix}"
        calibrate = pictures[0].parent if bits == "int8" else None
        if runtime == "torch":
            batches = [read_picture(model, picture)[None] for picture in pictures] if calibrate else []
            loaded[run] = write_torch(model, path, batches, batch_size)
        else:
            if not path.exists():
                print(export(model, [], path, to, calibrate=calibrate), file=sys.stderr)
            loaded[run] = load_runtime(path, runtime, dtype)
        sizes[run] = sum(file.stat().st_size for file in folder.glob(f"{path.stem}.*"))
    return sizes, loaded


def write_torch(model: nn.Module, path: Path, batches: Sequence[Tensor], batch_size: int) -> Run:
    """torch's program, in 8 bits where there are pictures, as a file, and compiled for batches of one size."""
    with quiet():
        shape = get_cfg(model)["input_size"]
        program = trace(reparameterize_model(model), shape, "torch")
        if batches:
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
            from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

            quantizer = x86.X86InductorQuantizer()
            quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
            prepared = prepare_pt2e(program.module(), quantizer)
            for x in batches:
                prepared(x)
            quantized = convert_pt2e(prepared)
            used = {node.target for node in quantized.graph.nodes if node.op == "get_attr"}
            for name in [name for name, _ in quantized.named_parameters() if name not in used]:
                parent, _, own = name.rpartition(".")  # a weight in float32, which torch would write as well
                delattr(quantized.get_submodule(parent), own)
            program = trace(quantized, shape, "torch")
        torch.export.save(program, path)
        compiled = torch.compile(program.module(), dynamic=False)

    def run(x: Tensor) -> Tensor:
        parts = [compiled(nn.functional.pad(part, [0] * 7 + [batch_size - len(part)])) for part in x.split(batch_size)]
        return torch.cat(parts)[: len(x)]

    return run


@torch.no_grad()
def time_runs(loaded: dict[tuple, Run], x: Tensor, rounds: int) -> dict[tuple, list[float]]:
    seconds: dict[tuple, list[float]] = {key: [] for key in loaded}
    for round_ in tqdm(range(rounds + 2), desc="timing", unit="round"):
        for key, run in loaded.items():
            start = time.perf_counter()
            run(x)
            if round_ >= 2:  # the first two warm up and compile
                seconds[key].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
