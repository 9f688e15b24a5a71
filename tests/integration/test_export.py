"""ONNX of every variant with a block a stage, in onnxruntime; test_demo.py has all blocks of CMT-Ti."""

import warnings
from pathlib import Path

import pytest
import timm
import torch
from common import MODELS, RESIZES
from timm.utils import reparameterize_model
from torch import Tensor

onnx = pytest.importorskip("onnx", reason="NOT TESTED: ONNX; pip install onnx onnxruntime onnxscript")
runtime = pytest.importorskip("onnxruntime", reason="NOT TESTED: ONNX; pip install onnx onnxruntime onnxscript")


def infer(path: Path, x: Tensor) -> Tensor:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1  # more would spin while they wait
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, dict(x=x.numpy()))[0])


# The tracing exporter, which timm's onnx_export.py uses, takes a tenth of the time of the newer one.
# test_any_size_compiled.py has CMT-Ti by the newer one.
@pytest.mark.parametrize(
    ("name", "folded", "dynamo"),
    [*((name, False, False) for name in MODELS), ("cmt_l", False, True), ("cmt_ti", True, True)],
)
def test_onnx_agrees_for_every_variant_and_has_no_interpolation(name, folded, dynamo, tmp_path):
    if dynamo and torch.__version__.startswith("2.6."):
        pytest.skip("NOT TESTED: ONNX by torch 2.6's new exporter, which knows no BatchNorm")
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64, num_classes=10, depths=(1, 1, 1, 1)).eval()
    if folded:
        model = reparameterize_model(model)
    path = tmp_path / "model.onnx"
    batch = dict(dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1024)},), external_data=False, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.zeros(2, 3, 64, 64),),
            path,
            dynamo=dynamo,
            input_names=["x"],
            **(batch if dynamo else dict(dynamic_axes=dict(x={0: "batch"}))),
        )
    assert not {node.op_type for node in onnx.load(path).graph.node} & RESIZES
    x = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
    assert (infer(path, x) - expected).abs().max() <= 1e-4 * expected.abs().max()
