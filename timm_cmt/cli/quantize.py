"""8 bits for the files that ``timm-cmt export`` writes: which layers have them, and what is asked of the result.

onnxruntime and NNCF do the work. What stays in float is what was slower or less exact in 8 bits.
"""

import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data.readers.img_extensions import get_img_extensions
from torch import Tensor

__all__ = ["compare", "find_pictures", "measure_agreement", "quantize_onnx", "quantize_openvino"]

MOST = 300  # pictures; more tell little that is new, and take longer
LEAST_CORRELATION = 0.98  # of the logits with those of the model; what is broken has had 0.5 and less


def find_pictures(folder: Path, most: int = MOST) -> list[Path]:
    """The pictures in a folder and its subfolders, so many at most, evenly from all of them.

    Raises:
        FileNotFoundError: There is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--calibrate {folder} is no folder; name one with pictures like those of later")
    suffixes = get_img_extensions(as_set=True)
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))  # Macs add some
    found = sorted(path for path in files if path.suffix.lower() in suffixes)
    if not found:
        raise FileNotFoundError(
            f"there is no picture in {folder}; name a folder with {', '.join(sorted(suffixes))}, some hundred of them"
        )
    count = min(len(found), most)
    return [found[i * len(found) // count] for i in range(count)]


def quantize_onnx(path: Path, batches: Sequence[Tensor]) -> None:
    """Quantize an ONNX file in place: convolutions and linear layers, each output channel of the weights by itself.

    In float stay the depth-wise convolutions, for which onnxruntime's 8 bits are slower, and attention's products.
    Activations are unsigned and weights signed, which x86's instructions are for.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            x = next(self.batches, None)
            return None if x is None else {"x": x.numpy()}

    facts = onnx.load(path, load_external_data=False).metadata_props
    prepared = path.with_suffix(".prepared")
    quant_pre_process(path, prepared, skip_symbolic_shape=True)
    graph = onnx.load(prepared).graph
    weights = {tensor.name for tensor in graph.initializer}
    left = [
        node.name
        for node in graph.node
        if (node.op_type == "Conv" and any(a.name == "group" and a.i > 1 for a in node.attribute))
        or (node.op_type == "MatMul" and node.input[1] not in weights)
    ]
    quantize_static(
        prepared,
        path,
        Reader(),
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        nodes_to_exclude=left,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        # What a product gives goes on in float: one rounding less, and onnxruntime has a kernel for it.
        extra_options=dict(OpTypesToExcludeOutputQuantization=["MatMul", "Gemm"]),
    )
    quantized = onnx.load(path)
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(facts)
    onnx.save(quantized, path)


def quantize_openvino(converted: Any, batches: Sequence[Tensor]) -> Any:
    """OpenVINO's model in 8 bits: convolutions, linear layers, and the sums of the blocks.

    In float stay attention, LayerNorm and GELU.
    """
    import nncf

    nncf.set_log_level(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):  # its progress bars
        return nncf.quantize(
            converted,
            nncf.Dataset([x.numpy() for x in batches]),
            subset_size=len(batches),
            # For processors without 8-bit instructions (VNNI) it would give the first convolution 7 bits, which cost
            # more accuracy than all else together.
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.DISABLE),
        )


def measure_agreement(expected: Tensor, actual: Tensor) -> tuple[float, float]:
    """Of logits, [B, classes] twice: which share has the same likeliest class, and the correlation of all."""
    same = (actual.argmax(1) == expected.argmax(1)).float().mean().item()
    return same, torch.corrcoef(torch.stack([actual.flatten(), expected.flatten()]))[0, 1].item()


def compare(outputs: Sequence[tuple[Tensor, Tensor]]) -> str:
    """How far a quantized file agrees with its model.

    Args:
        outputs: Of each picture, the model's logits and the file's.

    Returns:
        How many have the same likeliest class, and the correlation of the logits.

    Raises:
        RuntimeError: The correlation is under 0.98.
    """
    expected, actual = map(torch.cat, zip(*outputs))
    same, correlation = measure_agreement(expected, actual)
    said = f"the same class for {same:.1%} of {len(actual)} pictures, correlation of the logits {correlation:.4f}"
    if not correlation >= LEAST_CORRELATION:  # nor not-a-number
        raise RuntimeError(
            f"8 bits are too few here ({said}, at least {LEAST_CORRELATION} is asked for), so the file is removed; "
            f"calibrate on more pictures, such as the model is for, or leave out --int8"
        )
    return said
