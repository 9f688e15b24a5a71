"""The demo, as a user runs it, and the model it trains with 8-bit linear layers in onnxruntime."""

import functools
import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from common import RESIZES
from PIL import Image
from timm.data import create_dataset, create_loader
from torch import Tensor, nn

from timm_cmt.cli import main


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """`timm-cmt demo`, run once as a user would (a minute or more): how it ended, and the folder it wrote."""
    cwd = tmp_path_factory.mktemp("demo")
    done = subprocess.run([sys.executable, "-m", "timm_cmt", "demo"], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done, cwd / "timm-cmt-demo"


def test_the_demo_reaches_98_percent(demo):
    done, folder = demo
    assert float(re.search(r"top-1 ([\d.]+) %", done.stdout)[1]) >= 98
    assert "python train.py --data-dir" in done.stdout and "python validate.py --data-dir" in done.stdout
    assert "training cmt_ti: 100%" in done.stderr
    assert Image.open(folder / "predictions.png").width > 1000
    model = timm.create_model("cmt_ti", img_size=64, num_classes=10, checkpoint_path=str(folder / "last.pth.tar"))
    digit = next((folder / "digits" / "validation" / "4").iterdir())
    transform = timm.data.create_transform((3, 64, 64), crop_pct=1.0)
    assert model.eval()(transform(Image.open(digit))[None]).argmax().item() == 4


@pytest.fixture(scope="module")
def exported(demo) -> Path:
    """model.onnx, by the commands that the demo printed."""
    pytest.importorskip("onnxruntime", reason="NOT TESTED: the export; pip install onnx onnxruntime onnxscript")
    done, folder = demo
    (command,) = re.findall(r"^timm-cmt (convert .*)$", done.stdout, re.M)
    assert main(shlex.split(command)) == 0
    *_, snippet = find_snippets(done.stdout)
    exec(snippet, {})  # noqa: S102
    return folder / "model.onnx"


def find_snippets(text: str) -> list[str]:
    return re.findall(r"^import timm.*\n(?:.+\n)+", text, re.M)


def test_its_printed_ways_to_predict_and_convert_work(demo, exported, tmp_path):
    done, folder = demo
    snippets = find_snippets(done.stdout)
    assert [snippet.count("\n") for snippet in snippets] == [4, 4]
    predict = subprocess.run([sys.executable, "-c", snippets[0]], cwd=tmp_path, capture_output=True, text=True)
    label = re.search(r"validation/(\d)/", snippets[0])[1]
    assert predict.stdout.split() == [label], predict.stderr
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["label_names"] == [str(digit) for digit in range(10)]
    assert config["pretrained_cfg"]["crop_pct"] == 1.0 and config["pretrained_cfg"]["input_size"] == [3, 64, 64]


def test_the_onnx_that_its_printed_commands_write_has_the_model_s_answers_and_no_interpolation(demo, exported, digits):
    import onnx
    from test_export import infer

    _, folder = demo
    assert not {node.op_type for node in onnx.load(exported).graph.node} & RESIZES
    model = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    images = digits("validation")[0][:50]
    with torch.inference_mode():
        expected = model(images)
    assert (infer(exported, images) - expected).abs().max() <= 1e-4 * expected.abs().max()


# ---- 8-bit linear layers


@pytest.fixture(scope="module")
def digits(demo):
    """split -> (images, labels) of the demo's digits."""
    _, folder = demo

    @functools.cache
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
def prepared(exported) -> Path:
    """The demo's model, as onnxruntime's quantisation wants it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(exported, exported.with_name("prepared.onnx"))
    return exported.with_name("prepared.onnx")


@pytest.fixture(scope="module")
def accuracy(prepared, digits) -> float:
    """Top-1 in percent before quantisation."""
    return top1(prepared, digits)


def linear_layers() -> int:
    model = timm.create_model("cmt_ti", device="meta")
    return sum(isinstance(module, nn.Linear) for module in model.modules())


def top1(path: Path, digits) -> float:
    from test_export import infer

    images, labels = digits("validation")
    percent = 100 * (infer(path, images).argmax(1) == labels).float().mean().item()
    print(f"{path.name}: top-1 {percent:.2f} %, {path.stat().st_size / 1e6:.1f} MB")  # the page's table; -rP shows it
    return percent


def test_dynamic_quantisation_keeps_the_demo_s_accuracy(prepared, accuracy, digits, tmp_path):
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = tmp_path / "dynamic.onnx"
    quantize_dynamic(prepared, path, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8)
    operators = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert operators["MatMulInteger"] == linear_layers()
    assert top1(path, digits) >= accuracy - 1


def test_static_quantisation_keeps_the_demo_s_accuracy(prepared, accuracy, digits, tmp_path):
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Calibration(CalibrationDataReader):
        batches = iter(digits("train")[0][:256].split(64))

        def get_next(self) -> dict | None:
            batch = next(self.batches, None)
            return None if batch is None else dict(x=batch.numpy())

    path = tmp_path / "static.onnx"
    quantize_static(
        prepared,
        path,
        Calibration(),
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        extra_options=dict(MatMulConstBOnly=True),
    )
    weights = Counter(tensor.data_type for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 2)
    assert weights[onnx.TensorProto.INT8] == linear_layers()
    assert top1(path, digits) >= accuracy - 1
