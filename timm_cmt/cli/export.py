"""A model as a file for another program, as ``timm-cmt export`` writes it.

The exporters of torch, ONNX, OpenVINO, ExecuTorch and LiteRT do the work. Here are the settings that CMT needs, what a
user of the file has to know of the model, and a check of the written file.
"""

import importlib.util
import inspect
import io
import json
import logging
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import LayerNorm2d
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from tqdm import tqdm

from .. import __version__
from ..cmt import CMT, MIN_SIZE
from .models import get_cfg
from .predict import read_picture
from .quantize import compare, find_pictures, quantize_onnx, quantize_openvino

__all__ = ["FORMATS", "INT8", "ONE_IMAGE", "WRITERS", "export", "quiet", "save_onnx", "suit", "trace"]

FORMATS = {  # what the file's name ends in, and the packages that write and run it
    "torch": (".pt2", []),
    "onnx": (".onnx", ["onnx", "onnxscript", "onnxruntime"]),
    "openvino": (".xml", ["openvino"]),
    "executorch": (".pte", ["executorch"]),
    "litert": (".tflite", ["litert_torch"]),
}
INT8 = {"onnx": [], "openvino": ["nncf"]}  # formats with 8 bits, and the packages that these need besides
ONE_IMAGE = ["executorch", "litert"]  # their files plan the memory of a run beforehand
TOLERANCE = 1e-4  # of the largest output
LARGEST = 4096  # pixels a side, and images in a batch 1024: torch needs bounds
SMALLEST_IN_TORCH = 64  # torch's own program of any size refuses less

Run = Callable[[Tensor], Tensor]


def export(
    model: CMT,
    labels: Sequence[str],
    out: Path,
    to: str,
    dynamic_size: bool = False,
    images: Sequence[Path] = (),
    calibrate: Path | None = None,
) -> str:
    """Write a model, folded, and compare what was written with the model before it gets its name.

    The file takes any number of images; in the formats of ONE_IMAGE, one.

    Args:
        model: The model, for inference; the file is for its input size. It stays as it is.
        labels: The names of its classes; [] if unknown.
        out: The file to write. OpenVINO's weights go beside it.
        to: One of FORMATS.
        dynamic_size: Let the file take images of any size, by resizing the position bias in it.
        images: Pictures to compare on; random ones if there are none.
        calibrate: Write 8 bits, by what the pictures in this folder need, and compare on them.

    Returns:
        A sentence: the largest difference, and on what. Of 8 bits: how far the classes and logits agree.

    Raises:
        FileExistsError: There is such a file already.
        FileNotFoundError: There are no pictures to calibrate on.
        ValueError: The name does not end as that format's do, or what is no picture is given, or 8 bits of a format
            or with a choice that has none.
        RuntimeError: The exporter is not installed, or fails, or the file does not give what the model gives.
    """
    files = _list_files(out, to)
    if calibrate and (to not in INT8 or dynamic_size or images):
        raise ValueError("--int8 is for --to onnx and openvino alone, without --dynamic-size and --images")
    _require(to, dynamic_size, INT8[to] if calibrate else [])
    cfg = get_cfg(model)
    folded = reparameterize_model(model.eval())
    suit(folded, to)
    facts = {
        "model": cfg["architecture"],
        "labels": list(labels),
        **{key: cfg[key] for key in ("input_size", "mean", "std", "crop_pct", "interpolation")},
        "dynamic_size": dynamic_size,
        "written_by": f"timm-cmt {__version__}, timm {timm.__version__}, torch {torch.__version__}",
    }
    pictures = find_pictures(calibrate) if calibrate else images
    batches = list(_make_batches(model, to, dynamic_size, pictures))
    calibration = [batches] if calibrate else []
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work,
        tqdm(total=2 + len(batches), unit="step", desc="torch.export") as bar,
        quiet(),
        torch.no_grad(),
    ):
        try:
            program = trace(folded, cfg["input_size"], to, dynamic_size)
            bar.update()
            bar.set_description(f"writing for {to}")
            texts = {key: json.dumps(value) for key, value in facts.items()}
            run = WRITERS[to](program, Path(work) / out.name, texts, *calibration)
        except Exception as err:  # each exporter has errors of its own
            reason = next((line.strip() for line in str(err).splitlines() if line.strip()), type(err).__name__)
            raise RuntimeError(f"the exporter for {to} failed ({reason}); try another version of it") from None
        bar.update()
        largest, outputs = 0.0, list[tuple[Tensor, Tensor]]()
        for x in batches:
            bar.set_description(f"comparing at {_to_text(x)}")
            expected, actual = model(x), run(x)
            outputs.append((expected, actual))
            difference = (actual - expected).abs().max() / expected.abs().max()
            if not calibrate and not difference <= TOLERANCE:  # nor not-a-number
                raise RuntimeError(
                    f"the file for {to} differs from the model by {difference:.1e} of its largest output at "
                    f"{_to_text(x)} pixels, so it is removed; try other versions of the exporter, or report this"
                )
            largest = max(largest, difference.item())
            bar.update()
        agreement = compare(outputs) if calibrate else ""
        for name in reversed(files):  # the file that is opened comes last
            (Path(work) / name.name).rename(name)
    if calibrate:
        return f"8 bits, calibrated on {len(batches)} pictures in {calibrate}: {agreement}"
    sizes = ", ".join(dict.fromkeys(map(_to_text, batches)))
    what = "the pictures given" if images else "random pictures"
    return f"largest difference to the model: {largest:.1e} of its largest output, on {what} at {sizes} pixels"


def _list_files(out: Path, to: str) -> list[Path]:
    suffix = FORMATS[to][0]
    if out.suffix != suffix:
        raise ValueError(f"{out} is no name of a file for {to}; give {out.with_suffix(suffix)}")
    files = [out, out.with_suffix(".bin")] if to == "openvino" else [out]
    for file in files:
        if file.exists():
            raise FileExistsError(f"{file} is there already; name another file, or remove it")
    return files


def _require(to: str, dynamic_size: bool, others: Sequence[str]) -> None:
    if to in ONE_IMAGE and dynamic_size:
        raise RuntimeError(f"--to {to} writes a file for images of one size; give --size instead of --dynamic-size")
    missing = [name for name in [*FORMATS[to][1], *others] if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"--to {to} needs what is not installed; pip install {' '.join(missing)}")
    if to == "onnx" and torch.__version__.startswith("2.6."):
        raise RuntimeError("--to onnx needs torch 2.7 or newer, whose exporter knows BatchNorm")
    if (
        dynamic_size
        and "prefer_deferred_runtime_asserts_over_guards" not in inspect.signature(torch.export.export).parameters
    ):
        raise RuntimeError(f"--dynamic-size needs a newer torch than {torch.__version__}; pip install --upgrade torch")


def _make_batches(model: CMT, to: str, dynamic_size: bool, images: Sequence[Path]) -> Iterator[Tensor]:
    """-> [B, C, H, W] with one image and with three, or each picture; at several sizes if the file takes them."""
    channels, height, width = get_cfg(model)["input_size"]
    sizes = [(height, width)]
    if dynamic_size:
        least = SMALLEST_IN_TORCH if to == "torch" else MIN_SIZE
        sizes += [(least, least), (97, 161), (height + 32, width)]
    random = torch.Generator().manual_seed(0)
    for size in sizes:
        if images:
            yield from (read_picture(model, path, size)[None] for path in images)
        else:
            for batch in (1, 3) if size == sizes[0] and to not in ONE_IMAGE else (1,):
                yield torch.randn(batch, channels, *size, generator=random)


def trace(model: nn.Module, input_size: Sequence[int], to: str, dynamic_size: bool = False) -> ExportedProgram:
    """torch's program of a model, for as many images of [C, H, W] as a format takes, or for images of any size."""
    if to in ONE_IMAGE:
        return torch.export.export(model, (torch.zeros(1, *input_size),))
    x = torch.zeros(2, *input_size)  # of one image torch would conclude that there is always one
    shape, options = {0: Dim("batch", min=1, max=1024)}, dict[str, Any]()
    if dynamic_size:
        shape[2] = Dim("height", min=SMALLEST_IN_TORCH, max=LARGEST)
        shape[3] = Dim("width", min=SMALLEST_IN_TORCH, max=LARGEST)
        options["prefer_deferred_runtime_asserts_over_guards"] = True
    return torch.export.export(model, (x,), dynamic_shapes=(shape,), **options)


class _TokenNorm(nn.Module):
    """timm's LayerNorm2d, by way of [B, H * W, C]. OpenVINO has a kernel for that, and none for [B, H, W, C]."""

    def __init__(self, norm: LayerNorm2d):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        x = nn.LayerNorm.forward(self.norm, x.permute(0, 2, 3, 1).flatten(1, 2))
        return x.reshape(B, H, W, C).permute(0, 3, 1, 2)


def suit(model: nn.Module, to: str) -> None:
    """Change a model's layers, in place, to such as a format's runtimes have a kernel for. The outputs stay."""
    for module in list(model.modules()):
        if to in ("onnx", *ONE_IMAGE) and hasattr(module, "fused_attn"):
            # Two runtimes do not know torch's fused attention, and for ONNX it is written with one transpose more.
            vars(module)["fused_attn"] = False
        for name, child in module.named_children():
            if to == "openvino" and type(child) is LayerNorm2d:
                setattr(module, name, _TokenNorm(child))


def _write_torch(program: ExportedProgram, path: Path, facts: dict[str, str]) -> Run:
    torch.export.save(program, path, extra_files=facts)
    return torch.export.load(path).module()


def _write_onnx(program: ExportedProgram, path: Path, facts: dict[str, str], calibration: Sequence[Tensor] = ()) -> Run:
    import onnxruntime

    save_onnx(program, path, facts)
    if calibration:
        quantize_onnx(path, calibration)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def save_onnx(program: ExportedProgram, path: Path, facts: dict[str, str]) -> None:
    """Write a program as ONNX, with input `x` and output `logits`, and facts about it."""
    names: Any = dict(input_names=["x"], output_names=["logits"])
    exported = torch.onnx.export(program, (), dynamo=True, verbose=False, **names)
    if exported is None:
        raise RuntimeError(f"torch {torch.__version__} wrote no ONNX; pip install --upgrade torch onnxscript")
    exported.model.metadata_props.update(facts)
    exported.save(path, external_data=False)


def _write_openvino(
    program: ExportedProgram, path: Path, facts: dict[str, str], calibration: Sequence[Tensor] = ()
) -> Run:
    import openvino

    converted = openvino.convert_model(program)
    x = next(node.meta["val"] for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
    converted.reshape([side if type(side) is int else -1 for side in x.shape])  # the sizes that are known
    if calibration:
        converted = quantize_openvino(converted, calibration)
    for key, value in facts.items():
        converted.set_rt_info(value, ["model_info", key])
    openvino.save_model(converted, path, compress_to_fp16=False)
    # Not the default, which is bfloat16 on some processors.
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: torch.from_numpy(compiled(x.numpy())[0])


def _write_executorch(program: ExportedProgram, path: Path, facts: dict[str, str]) -> Run:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.utils.configs import get_transform_passes
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    options: Any = dict(transform_passes=get_transform_passes(), constant_methods=facts)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], **options)
    path.write_bytes(lowered.to_executorch().buffer)
    loaded = Runtime.get().load_program(path)
    method = loaded.load_method("forward")
    return lambda x: method.execute([x.contiguous()])[0].clone()


def _write_litert(program: ExportedProgram, path: Path, facts: dict[str, str]) -> Run:
    import litert_torch
    from ai_edge_litert.interpreter import Interpreter

    litert_torch.convert(program.module(), tuple(program.example_inputs[0])).export(str(path))
    with zipfile.ZipFile(path, "a") as end:  # where files of this format have what is not the network
        for key, value in facts.items():
            end.writestr(key, value)
    interpreter = Interpreter(str(path))
    run = interpreter.get_signature_runner()
    (x,), (logits,) = run.get_input_details(), run.get_output_details()
    return lambda images: torch.from_numpy(run(**{x: images.numpy()})[logits])


WRITERS: dict[str, Callable[..., Run]] = {
    "torch": _write_torch,
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "executorch": _write_executorch,
    "litert": _write_litert,
}


@contextmanager
def quiet() -> Iterator[None]:
    """The exporters warn of their own future, and LiteRT prints its steps; what matters here is the comparison."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _to_text(x: Tensor) -> str:
    return f"{x.shape[-2]} x {x.shape[-1]}"
