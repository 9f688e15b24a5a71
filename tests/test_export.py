"""ONNX of every variant, and the demo's model with 8-bit linear layers, both in onnxruntime."""

from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from conftest import MODELS
from timm.data import create_dataset, create_loader
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


@pytest.mark.parametrize("name", MODELS)
def test_onnx_agrees_for_every_variant(name, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64, num_classes=10).eval()
    path = export(model, tmp_path / "model.onnx")
    x = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
    assert (infer(path, x) - expected).abs().max() <= 1e-4 * expected.abs().max()


# ---- 8-bit linear layers


@pytest.fixture(scope="module")
def digits(demo):
    """split -> (images, labels) of the demo's digits."""
    _, folder = demo

    def load(split: str) -> tuple[Tensor, Tensor]:
        dataset = create_dataset("", root=str(folder / "digits"), split=split)
        loader = create_loader(
            dataset,
            input_size=(3, 64, 64),
            batch_size=len(dataset),
            interpolation="bicubic",
            crop_pct=1.0,
            num_workers=0,
            persistent_workers=False,
            pin_memory=False,
            device=torch.device("cpu"),
        )
        return next(iter(loader))

    return load


@pytest.fixture(scope="module")
def exported(demo, tmp_path_factory) -> Path:
    """The demo's model, as onnxruntime's quantisation wants it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    _, folder = demo
    model = timm.create_model(
        "cmt_ti", img_size=64, num_classes=10, checkpoint_path=str(folder / "last.pth.tar")
    ).eval()
    path = export(model, tmp_path_factory.mktemp("onnx") / "model.onnx")
    quant_pre_process(path, path.with_name("prepared.onnx"))
    return path.with_name("prepared.onnx")


def linear_layers() -> int:
    model = timm.create_model("cmt_ti", device="meta")
    return sum(isinstance(module, nn.Linear) for module in model.modules())


def top1(path: Path, digits) -> float:
    images, labels = digits("validation")
    accuracy = 100 * (infer(path, images).argmax(1) == labels).float().mean().item()
    print(f"{path.name}: top-1 {accuracy:.2f} %, {path.stat().st_size / 1e6:.1f} MB")  # README's table; -rP shows it
    return accuracy


@pytest.mark.slow
def test_dynamic_quantisation_keeps_the_demo_s_accuracy(exported, digits, tmp_path):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = tmp_path / "dynamic.onnx"
    quantize_dynamic(exported, path, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8)
    operators = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert operators["MatMulInteger"] == linear_layers()
    assert top1(path, digits) >= top1(exported, digits) - 1


@pytest.mark.slow
def test_static_quantisation_keeps_the_demo_s_accuracy(exported, digits, tmp_path):
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Calibration(CalibrationDataReader):
        batches = iter(digits("train")[0][:256].split(64))

        def get_next(self) -> dict | None:
            batch = next(self.batches, None)
            return None if batch is None else dict(x=batch.numpy())

    path = tmp_path / "static.onnx"
    quantize_static(
        exported,
        path,
        Calibration(),
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        extra_options=dict(MatMulConstBOnly=True),
    )
    weights = Counter(tensor.data_type for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 2)
    assert weights[onnx.TensorProto.INT8] == linear_layers()
    assert top1(path, digits) >= top1(exported, digits) - 1
