"""Images per second of the CMT models and of their peers in timm, in evaluation and in training.

Every round times each run once, so that what else the machine does falls on all alike. Printed are medians over the
rounds and, against the first model in the same mode (or the plain one, where it lacks that), the median and quartiles
of the rounds' ratios. With --authors, a CMT has the weights of the authors' model, and where that is timed in eager
mode beside it, its outputs are compared with theirs. Those of a runtime are compared with the model's own.
Run: python benchmarks/throughput.py [--models cmt_s deit_small_patch16_224 ...] [--modes eager reparam compile train]
"""

import argparse
import importlib.util
import json
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn
from tqdm import tqdm

from timm_cmt.cli.cards import TOP1 as CMT_TOP1
from timm_cmt.cli.export import FORMATS, quiet, save_onnx, suit
from timm_cmt.cmt import VARIANTS

RUNTIMES = {"onnxruntime": "onnx", "openvino": "openvino"}  # and the format, of timm-cmt export, that each runs
MODES = ["eager", "reparam", "compile", *RUNTIMES, "train", "recompute"]
DTYPES = ["float32", "bfloat16"]
AUTHORS = "authors:"  # before the name of a variant: the authors' code for it

# ImageNet top-1 as others report it: the paper (CMT), and timm's results-imagenet.csv for weights trained on it alone.
TOP1 = dict(
    **CMT_TOP1,
    cmt_l=84.8,
    deit_small_patch16_224=79.856,
    regnety_040=82.308,
    pvt_v2_b2=82.062,
    swin_small_patch4_window7_224=83.228,
    twins_svt_base=83.122,
    efficientnet_b4=82.658,
)

# Table 9 of the paper, both halves, with the images per second that it gives on a V100, where they are at hand.
# PVTv2-B2 and B5 stand for PVT-M and L, which timm does not have.
TABLE_9 = {
    "cmt_s": 562.5,
    "deit_small_patch16_224": 940.4,
    "regnety_040@224": 1156.7,
    "efficientnet_b4@380": 349.4,
    "pvt_v2_b2": None,
    "swin_small_patch4_window7_224": 436.9,
    "twins_svt_base": 469.0,
    "cmt_b": 285.4,
    "deit_base_patch16_224": 292.3,
    "regnety_160@224": None,
    "efficientnet_b6@528": None,
    "pvt_v2_b5": None,
    "swin_base_patch4_window7_224": None,
    "twins_svt_large": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models",
        nargs="+",
        default=list(TOP1),
        help=f"timm's names, or NAME@SIZE for another image size than timm's; {AUTHORS}cmt_s is the authors'",
    )
    parser.add_argument("--table-9", action="store_true", help="the models of the paper's Table 9, beside its figures")
    parser.add_argument(
        "--modes",
        nargs="+",
        default=["eager", "reparam", "train"],
        choices=MODES,
        help="compile and the runtimes, on the CPU, are of reparameterized CMTs; recompute is training with "
        "recompute_act",
    )
    parser.add_argument("--authors", type=Path, help="cmt.py of a clone of the authors' code, for their models")
    parser.add_argument("--size", type=int, nargs="+", help="image sizes (default: each model's own)")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8])
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=["float32"],
        choices=DTYPES,
        help="bfloat16 is by autocast, and OpenVINO's own; onnxruntime has none on the CPU",
    )
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--rounds", type=int, default=10, help="2 or more")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument(
        "--plot", type=Path, help="picture of accuracy, as reported, against measured images per second"
    )
    args = parser.parse_args()
    if args.table_9:
        args.models = list(TABLE_9)

    keys = [
        (model, mode, dtype, size, batch)
        for dtype in args.dtype
        for model in args.models
        for size in args.size or [None]
        for batch in args.batch_size
        for mode in args.modes
        if has_mode(model, mode, dtype)
    ]
    if not keys:
        parser.error(
            f"{', '.join(args.models)} has none of the modes {', '.join(args.modes)}; add eager, compile or train"
        )
    if args.rounds < 2:
        parser.error(f"{args.rounds} rounds have no quartiles; give 2 or more")
    for mode in RUNTIMES.keys() & args.modes:
        packages = [name for name in FORMATS[RUNTIMES[mode]][1] if importlib.util.find_spec(name) is None]
        if packages:
            parser.error(f"--modes {mode} needs what is not installed; pip install {' '.join(packages)}")
        if args.device != "cpu":
            parser.error(f"--modes {mode} is timed on the CPU alone; leave it out, or --device {args.device}")
    references = {key: find_reference(key, args.models[0], keys) for key in keys}
    if None in references.values():
        parser.error(f"{args.models[0]}, the first model, has none of these modes to compare with; add eager or train")
    # Or what comes after the eighth CMT, torch's limit, runs as it is.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, len(keys))
    given = args.device, args.authors, args.channels_last
    runs = {key: make_run(*key, *given) for key in tqdm(keys, desc="building", unit="run")}
    seconds: dict[tuple, list[float]] = {key: [] for key in keys}
    peaks: dict[tuple, float] = {}
    outputs: dict[tuple, Tensor] = {}
    for round_ in tqdm(range(args.rounds + 2), unit="round"):
        for key, run in runs.items():
            if args.device != "cpu":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            out = run()
            if args.device != "cpu":
                torch.cuda.synchronize()
                peaks[key] = (torch.cuda.max_memory_allocated() - before) / 2**20
            if round_ >= 2:  # the first two warm up and compile
                seconds[key].append(time.perf_counter() - start)
            elif round_ == 0:
                outputs[key] = out.float().cpu()
        if round_ == 0:
            compare_outputs(outputs, args.device)

    rows = []
    for key in keys:
        model, mode, dtype, size, batch = key
        own = seconds[key]
        low, middle, high = statistics.quantiles([a / b for a, b in zip(seconds[references[key]], own)], n=4)
        rows.append(
            dict(
                model=model,
                mode=mode,
                dtype=dtype,
                size=size or find_size(model),
                batch=batch,
                images_per_second=round(batch / statistics.median(own), 2),
                ratio=round(middle, 3),
                quartiles=[round(low, 3), round(high, 3)],
                peak_mb=round(peaks[key]) if peaks else None,
            )
        )
    machine = describe(args.device)
    print(f"\n{machine}, torch {torch.__version__}")
    print(f"medians of {args.rounds} rounds; ratios against {args.models[0]}\n")
    titles = ["model", "mode", "dtype", "size", "batch", "images/s", "ratio", "quartiles", "peak MB"]
    titles += ["the paper's images/s, on a V100"] if args.table_9 else []
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for row in rows:
        low, high = row["quartiles"]
        cells = [row[name] for name in ("model", "mode", "dtype", "size", "batch", "images_per_second")]
        cells += [f"{row['ratio']:.2f}", f"{low:.2f}-{high:.2f}", row["peak_mb"] or "-"]
        if args.table_9:
            cells.append(TABLE_9[row["model"]] if row["mode"] == "eager" and TABLE_9[row["model"]] else "-")
        print(f"| {' | '.join(map(str, cells))} |")
    if args.json:
        part = args.json.with_name(f"{args.json.name}.part")
        result = dict(vars(args), machine=machine, torch=torch.__version__, rows=rows)
        part.write_text(json.dumps(result, default=str, indent=1) + "\n")
        part.replace(args.json)
    if args.plot:
        draw(rows, args.plot)


def find_reference(key: tuple, first_model: str, keys: list[tuple]) -> tuple | None:
    """The run of the first model that a run is compared with: in its mode, or in the plain one."""
    _, mode, *where = key
    plain = "train" if mode in ("train", "recompute") else "eager"
    return next((other for m in (mode, plain) if (other := (first_model, m, *where)) in keys), None)


def compare_outputs(outputs: dict[tuple, Tensor], device: str) -> None:
    """Exit where logits are off those in eager mode, timed beside them, by the largest: a CMT's the authors' model's,
    a runtime's those of the model itself.
    """
    for (model, mode, *where), actual in outputs.items():
        for other in [f"{AUTHORS}{model}", *([model] if mode in RUNTIMES else [])]:
            expected = outputs.get((other, "eager", *where))
            if expected is not None and mode not in ("train", "recompute"):
                error = ((actual - expected).abs().max() / expected.abs().max()).item()
                exact = where[0] == "float32" and device == "cpu"
                if not error < (1e-4 if exact else 0.1):  # CUDA's convolutions round float32 to TF32, ten bits
                    sys.exit(f"throughput.py: error: {model}, {mode}, is off the outputs of {other} by {error:.1e}")


def describe(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.*)$", info.read_text() if info.exists() else "", re.M)
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{name[1] if name else platform.machine()}, {instructions}, {torch.get_num_threads()} threads"


def find_size(model: str) -> int:
    """The size that a model is timed at unless --size is given: NAME@SIZE, or the one of its configuration."""
    name, _, size = model.removeprefix(AUTHORS).partition("@")
    return int(size or timm.get_pretrained_cfg(name).input_size[-1])


def has_mode(model: str, mode: str, dtype: str) -> bool:
    """Has the model this mode? The others' models do not fold, nor do they recompute activations."""
    if mode in RUNTIMES:
        return mode == "openvino" or dtype == "float32"
    return mode in ("eager", "compile", "train") or model in VARIANTS


def make_run(
    name: str,
    mode: str,
    dtype: str,
    size: int | None,
    batch: int,
    device: str = "cpu",
    authors: Path | None = None,
    channels_last: bool = False,
) -> Callable[[], Tensor]:
    """One evaluation of a batch, or one training step without the optimizer's."""
    torch.backends.cudnn.benchmark = True  # as timm's scripts have it
    size = size or find_size(name)
    model = make_model(name.partition("@")[0], size, mode, authors).to(device)
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    autocast = partial(torch.autocast, device, dtype=torch.bfloat16, enabled=dtype == "bfloat16")
    if mode in ("train", "recompute"):
        model.train()

        def run() -> Tensor:
            with autocast():
                loss = nn.functional.cross_entropy(model(x), torch.zeros(batch, dtype=torch.int64, device=device))
            loss.backward()
            model.zero_grad()
            return loss.detach()

        return run
    model.eval()
    if mode != "eager" and not name.startswith(AUTHORS):
        model = reparameterize_model(model)
    if mode in RUNTIMES:
        return make_runtime(model, x, mode, dtype)
    if mode == "compile":
        model = torch.compile(model, dynamic=False)

    @torch.no_grad()  # in inference mode ceilings.py would see operators before they are taken apart
    def run() -> Tensor:
        with autocast():
            return model(x)

    return run


@torch.no_grad()
def make_runtime(model: nn.Module, x: Tensor, mode: str, dtype: str) -> Callable[[], Tensor]:
    """The evaluation of a batch by another program, in a graph of this size and batch."""
    with quiet(), tempfile.TemporaryDirectory() as work:
        suit(model, "openvino" if mode == "openvino" else "onnx")
        program = torch.export.export(model, (x,))
        if mode == "openvino":
            import openvino

            run = load_runtime(openvino.convert_model(program), mode, dtype)
        else:
            save_onnx(program, Path(work) / "model.onnx", {})
            run = load_runtime(Path(work) / "model.onnx", mode, dtype)
    return partial(run, x.contiguous())


def load_runtime(model: Any, mode: str, dtype: str = "float32") -> Callable[[Tensor], Tensor]:
    """A file, or OpenVINO's model, in onnxruntime or OpenVINO, on as many threads as torch."""
    threads = torch.get_num_threads()
    if mode == "openvino":
        import openvino

        hints = dict(PERFORMANCE_HINT="LATENCY", INFERENCE_NUM_THREADS=threads)
        hints["INFERENCE_PRECISION_HINT"] = "f32" if dtype == "float32" else "bf16"
        compiled = openvino.Core().compile_model(model, "CPU", hints)
        return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads slow the next run
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def make_model(name: str, size: int, mode: str, authors: Path | None) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith(AUTHORS):
        variant = VARIANTS[name.removeprefix(AUTHORS)]
        return load_authors(authors).CMT(
            img_size=size,
            num_classes=1000,
            qkv_bias=True,
            qk_ratio=1,
            stem_channel=variant["stem_width"],
            embed_dims=list(variant["embed_dims"]),
            num_heads=[1, 2, 4, 8],
            depths=list(variant["depths"]),
            mlp_ratios=[variant["mlp_ratio"]] * 4,
            sr_ratios=[8, 4, 2, 1],
        )
    kwargs = dict(img_size=size) if timm.get_pretrained_cfg(name).fixed_input_size else {}
    if mode == "recompute":
        kwargs["recompute_act"] = True
    model = timm.create_model(name, **kwargs)
    if authors is not None and name in VARIANTS:
        model.load_state_dict(make_model(f"{AUTHORS}{name}", size, mode, authors).state_dict())
    return model


def load_authors(path: Path | None) -> object:
    """The authors' module, with timm's registry as it was: theirs would replace our names in it."""
    if path is None:
        sys.exit(f"throughput.py: error: {AUTHORS}... needs --authors PATH/TO/cmt.py")
    if "authors_cmt" not in sys.modules:
        registry = sys.modules["timm.models._registry"]
        names = [name for name, value in vars(registry).items() if isinstance(value, (dict, set))]
        before = {name: getattr(registry, name).copy() for name in names if not name.startswith("__")}
        spec = importlib.util.spec_from_file_location("authors_cmt", path)
        sys.modules["authors_cmt"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["authors_cmt"])
        for name, contents in before.items():
            getattr(registry, name).clear()
            getattr(registry, name).update(contents)
    return sys.modules["authors_cmt"]


def draw(rows: list[dict], path: Path) -> None:
    """Accuracy, as others report it, against measured images per second, of each mode's first size, batch and type."""
    from matplotlib.figure import Figure

    first = {(row["mode"], row["model"]): row for row in reversed(rows)}
    rows = list(first.values())
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    markers = dict(eager="o", reparam="^", compile="s", onnxruntime="D", openvino="P")
    names_at = next((mode for mode in markers if any(row["mode"] == mode for row in rows)), None)
    for mode, marker in markers.items():
        shown = sorted(
            (row for row in rows if row["mode"] == mode and row["model"] in TOP1),
            key=lambda row: row["images_per_second"],
        )
        if not shown:
            continue
        axes.scatter(
            [row["images_per_second"] for row in shown],
            [TOP1[row["model"]] for row in shown],
            c=["C3" if row["model"] in VARIANTS else "C0" for row in shown],
            marker=marker,
            label=mode,
        )
        for row in shown:
            if mode == names_at:
                point = (row["images_per_second"], TOP1[row["model"]])
                name = row["model"].removesuffix("_patch16_224").removesuffix("_patch4_window7_224")
                is_cmt = row["model"] in VARIANTS
                place = dict(xytext=(4, -11)) if is_cmt else dict(xytext=(-5, -3), ha="right")
                axes.annotate(name, point, textcoords="offset points", fontsize=7, **place)
    axes.set_xscale("log")
    axes.set_xlabel("images per second, measured")
    axes.set_ylabel("ImageNet top-1 in %, as reported")
    axes.legend()
    part = path.with_name(f"{path.name}.part")
    figure.savefig(part, format="png", dpi=110)
    part.replace(path)


if __name__ == "__main__":
    main()
