"""ONNX of CMT-Ti, and of every other variant with a block a stage, in onnxruntime."""

from pathlib import Path

import pytest
import timm
import torch
from common import MODELS
from timm.utils import reparameterize_model
from torch import Tensor, nn

onnx = pytest.importorskip("onnx", reason="NOT TESTED: ONNX; pip install onnx onnxruntime onnxscript")
runtime = pytest.importorskip("onnxruntime", reason="NOT TESTED: ONNX; pip install onnx onnxruntime onnxscript")


def export(model: nn.Module, path: Path) -> Path:
    """Write the model for batches of any length."""
    size = model.pretrained_cfg["input_size"]
    torch.onnx.export(
        model,
        (torch.zeros(2, *size),),
        path,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1024)},),
        input_names=["x"],
        external_data=False,
        verbose=False,
    )
    return path


def infer(path: Path, x: Tensor) -> Tensor:
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, dict(x=x.numpy()))[0])


@pytest.mark.parametrize(("name", "folded"), [*((name, False) for name in MODELS), ("cmt_ti", True)])
def test_onnx_agrees_for_every_variant_and_has_no_interpolation(name, folded, tmp_path):
    torch.manual_seed(0)
    depths = {} if name == "cmt_ti" else dict(depths=(1, 1, 1, 1))  # which export in a third of the time or less
    model = timm.create_model(name, img_size=64, num_classes=10, **depths).eval()
    if folded:
        model = reparameterize_model(model)
    path = export(model, tmp_path / "model.onnx")
    assert not {node.op_type for node in onnx.load(path).graph.node} & {"Resize", "Upsample"}
    x = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
    assert (infer(path, x) - expected).abs().max() <= 1e-4 * expected.abs().max()
