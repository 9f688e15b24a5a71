"""One model in every runtime that is installed: how far its outputs are from torch's, megabytes, images per second.

The model is folded and has random weights. All compute in float32, but for those that are called int8. Every round
times each runtime once at each batch size, so that what else the machine does falls on all alike; printed are medians.
What takes one image at a time is given the batch one by one. What is not installed, or fails, gets a line, and the
others go on.
Run: python benchmarks/runtimes.py [--model cmt_ti] [--runtimes onnxruntime ncnn ...]
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.export import ExportedProgram
from tqdm import tqdm

from timm_cmt.cli.export import FORMATS, ONE_IMAGE, WRITERS, suit, trace

Run = Callable[[Tensor], Tensor]
Made = tuple[Run | None, Path | None]  # no run: it is only written here; no path: there is no file
BATCHES = 1, 8
PLAIN = "torch, eager"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cmt_ti", help="timm's name")
    parser.add_argument("--size", type=int, help="pixels a side (default: the model's)")
    parser.add_argument(
        "--runtimes", nargs="+", default=list(RUNTIMES), choices=RUNTIMES, metavar="NAME", help=", ".join(RUNTIMES)
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # the exporters warn of their own future
    torch.manual_seed(0)
    size = args.size or timm.get_pretrained_cfg(args.model).input_size[-1]
    fixed = timm.get_pretrained_cfg(args.model).fixed_input_size
    model = reparameterize_model(timm.create_model(args.model, **(dict(img_size=size) if fixed else {})).eval())
    images = torch.randn(max(BATCHES), 3, size, size)
    with tempfile.TemporaryDirectory() as work, torch.no_grad():
        expected = model(images)
        megabytes = sum(each.nbytes for each in model.state_dict().values()) / 1e6
        rows = [dict(runtime=PLAIN, version=torch.__version__, difference=0.0, mb=round(megabytes, 1))]
        runs: dict[str, Run] = {PLAIN: model}
        with tqdm(args.runtimes, unit="runtime") as bar:
            for name in bar:
                bar.set_description(name)
                row, run = try_runtime(name, model, images, expected, Path(work))
                rows.append(row)
                if run is not None:
                    runs[name] = run
        seconds: dict[tuple[str, int], list[float]] = {(name, batch): [] for name in runs for batch in BATCHES}
        for round_ in tqdm(range(args.rounds + 1), unit="round"):
            for (name, batch), taken in seconds.items():
                start = time.perf_counter()
                runs[name](images[:batch])
                if round_:  # the first one warms up
                    taken.append(time.perf_counter() - start)
    for row in rows:
        for batch in BATCHES if row["runtime"] in runs else ():
            row[f"images_per_second_{batch}"] = round(batch / statistics.median(seconds[row["runtime"], batch]), 1)
    show(rows, f"{args.model} at {size} x {size}, {torch.get_num_threads()} threads, medians of {args.rounds} rounds")
    if args.json:
        part = args.json.with_name(f"{args.json.name}.part")
        part.write_text(json.dumps(dict(vars(args), size=size, rows=rows), default=str, indent=1) + "\n")
        part.replace(args.json)


def try_runtime(
    name: str, model: nn.Module, images: Tensor, expected: Tensor, work: Path
) -> tuple[dict[str, Any], Run | None]:
    """The row of a runtime, and what runs the model in it; None where it cannot be run here."""
    make, packages = RUNTIMES[name]
    missing = [package for package in packages if not any(distributions(name=package))]
    if missing:
        return dict(runtime=name, note=f"not installed: pip install {' '.join(missing)}"), None
    row: dict[str, Any] = dict(runtime=name, version=version(packages[0]) if packages else torch.__version__)
    try:
        with redirect_stdout(sys.stderr):  # some print their steps
            run, path = make(model, images, work)
        if path is not None:
            row["mb"] = round(measure(path) / 1e6, 1)
        if run is None:
            return row | dict(note="written; it runs on a Mac"), None
        run(images[:1])  # fails here, if it fails, and not in the rounds
        row["difference"] = ((run(images) - expected).abs().max() / expected.abs().max()).item()
        return row, run
    except Exception as err:  # each has errors of its own
        line = next((line.strip() for line in str(err).splitlines() if line.strip()), "")
        return row | dict(note=f"failed: {type(err).__name__}: {line[:150]}"), None


def measure(path: Path) -> int:
    """Bytes of a file or a folder, and of the weights beside it."""
    files = path.rglob("*") if path.is_dir() else path.parent.glob(f"{path.stem}*")
    return sum(file.stat().st_size for file in files if file.suffix in (path.suffix, ".bin") or path.is_dir())


def show(rows: list[dict[str, Any]], title: str) -> None:
    print(f"\n{title}\n\n| runtime | version | difference | MB | images/s | in batches of {BATCHES[-1]} |")
    print(f"|{'---|' * 6}")
    for row in rows:
        difference = f"{row['difference']:.0e}" if "difference" in row else row.get("note", "")
        speeds = [row.get(f"images_per_second_{batch}", "") for batch in BATCHES]
        cells = [row["runtime"], row.get("version", ""), difference, row.get("mb", ""), *speeds]
        print(f"| {' | '.join(map(str, cells))} |")


# ---- the runtimes


def trace_for(to: str, model: nn.Module, images: Tensor) -> ExportedProgram:
    """As `timm-cmt export` does it."""
    suited = copy.deepcopy(model)
    suit(suited, to)
    return trace(suited, images.shape[1:], to)


def trace_one(model: nn.Module, images: Tensor) -> ExportedProgram:
    """For one image, with attention as products and a softmax."""
    return trace_for(ONE_IMAGE[0], model, images)


def one_by_one(run: Run) -> Run:
    return lambda x: torch.cat([run(image) for image in x.split(1)])


def write_script(model: nn.Module, images: Tensor, work: Path) -> Made:
    path = work / "model.ts"
    torch.jit.script(model).save(path)
    return torch.jit.freeze(torch.jit.load(path)), path


def write_format(to: str, model: nn.Module, images: Tensor, work: Path) -> Made:
    path = work / f"{to}{FORMATS[to][0]}"
    run = WRITERS[to](trace_for(to, model, images), path, {})
    return one_by_one(run) if to in ONE_IMAGE else run, path


def write_inductor(model: nn.Module, images: Tensor, work: Path) -> Made:
    path = work / "inductor.pt2"
    torch._inductor.aoti_compile_and_package(trace_for("torch", model, images), package_path=str(path))
    return torch._inductor.aoti_load_package(str(path)), path


def compile_openvino(model: nn.Module, images: Tensor, work: Path) -> Made:
    import openvino.torch  # noqa: F401 (names the backend)

    options = dict(aot_autograd=True, config={"INFERENCE_PRECISION_HINT": "f32"})
    return torch.compile(model, backend="openvino", dynamic=False, options=options), None


def write_nncf(model: nn.Module, images: Tensor, work: Path) -> Made:
    import nncf
    import openvino

    path = work / "nncf.xml"
    converted = nncf.compress_weights(openvino.convert_model(trace_for("openvino", model, images)))
    openvino.save_model(converted, path)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: torch.from_numpy(compiled(x.numpy())[0]), path


def write_tvm(model: nn.Module, images: Tensor, work: Path) -> Made:
    import tvm
    from tvm.relax.frontend.torch import from_exported_program

    path = work / "tvm.so"
    imported = from_exported_program(trace_one(model, images), run_ep_decomposition=True)
    tvm.compile(imported, tvm.target.Target("llvm")).export_library(str(path))
    machine = tvm.relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())
    return one_by_one(lambda x: torch.from_numpy(machine["main"](tvm.runtime.from_dlpack(x))[0].numpy())), path


def write_ncnn(model: nn.Module, images: Tensor, work: Path) -> Made:
    import ncnn
    import pnnx

    pnnx.export(model, str(work / "ncnn.pt"), (images[:1],), fp16=False)
    path = work / "ncnn.ncnn.param"
    net = ncnn.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.load_param(str(path))
    net.load_model(str(path.with_suffix(".bin")))

    def run(x: Tensor) -> Tensor:
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(x[0].numpy()).clone())
        return torch.tensor(extractor.extract("out0")[1].numpy())[None]

    return one_by_one(run), path


def write_core_ml(model: nn.Module, images: Tensor, work: Path) -> Made:
    return convert_core_ml(trace_one(model, images).run_decompositions({}), work / "program.mlpackage")


def write_core_ml_trace(model: nn.Module, images: Tensor, work: Path) -> Made:
    import coremltools

    inputs = [coremltools.TensorType(name="x", shape=images[:1].shape)]
    return convert_core_ml(torch.jit.trace(model, images[:1]), work / "trace.mlpackage", inputs=inputs)


def convert_core_ml(traced: Any, path: Path, **given: Any) -> Made:
    import coremltools

    coremltools.convert(
        traced,
        minimum_deployment_target=coremltools.target.iOS17,
        compute_precision=coremltools.precision.FLOAT32,
        **given,
    ).save(str(path))
    return None, path


def quantize_torchao(model: nn.Module, images: Tensor, work: Path) -> Made:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    path = work / "torchao.pt"
    quantized = copy.deepcopy(model)
    quantize_(quantized, Int8WeightOnlyConfig())
    torch.save(quantized.state_dict(), path)
    return quantized, path


RUNTIMES: dict[str, tuple[Callable[[nn.Module, Tensor, Path], Made], list[str]]] = {
    "TorchScript": (write_script, []),
    "torch.export": (partial(write_format, "torch"), []),
    "AOTInductor": (write_inductor, []),
    "onnxruntime": (partial(write_format, "onnx"), ["onnxruntime", "onnx", "onnxscript"]),
    "openvino": (partial(write_format, "openvino"), ["openvino"]),
    "openvino by torch.compile": (compile_openvino, ["openvino"]),
    "openvino, int8 weights by nncf": (write_nncf, ["nncf", "openvino"]),
    "executorch": (partial(write_format, "executorch"), ["executorch"]),
    "litert": (partial(write_format, "litert"), ["litert-torch"]),
    "tvm": (write_tvm, ["apache-tvm"]),
    "ncnn": (write_ncnn, ["ncnn", "pnnx"]),
    "coremltools": (write_core_ml, ["coremltools"]),
    "coremltools by a trace": (write_core_ml_trace, ["coremltools"]),
    "torchao, int8 weights": (quantize_torchao, ["torchao"]),
}

if __name__ == "__main__":
    main()
