"""The demo, as a user runs it, and the model it trains, exported and in 8 bits."""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from common import RESIZES
from PIL import Image
from timm.data import create_dataset, create_loader
from torch import Tensor

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


def run_printed(demo, command: str) -> Path:
    """Run a command of ours that the demo printed; returns what it wrote."""
    done, _ = demo
    (line,) = re.findall(rf"^timm-cmt ({command} .*)$", done.stdout, re.M)
    arguments = shlex.split(line)
    assert main(arguments) == 0
    return Path(arguments[arguments.index("--out") + 1])


@pytest.fixture(scope="module")
def converted(demo) -> Path:
    return run_printed(demo, "convert")


@pytest.fixture(scope="module")
def exported(demo, converted) -> Path:
    pytest.importorskip("onnxruntime", reason="NOT TESTED: the export; pip install onnx onnxruntime onnxscript")
    if torch.__version__.startswith("2.6."):
        pytest.skip("NOT TESTED: the demo's export with torch 2.6, whose exporter knows no BatchNorm")
    return run_printed(demo, "export")


def test_its_printed_ways_to_predict_and_convert_work(demo, converted, tmp_path):
    done, _ = demo
    (snippet,) = re.findall(r"^import timm.*\n(?:.+\n)+", done.stdout, re.M)
    assert snippet.count("\n") == 4
    predict = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True)
    label = re.search(r"validation/(\d)/", snippet)[1]
    assert predict.stdout.split() == [label], predict.stderr
    config = json.loads((converted / "config.json").read_text())
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


# ---- 8 bits


@pytest.mark.parametrize("to", ["onnx", "openvino"])
@pytest.mark.skipif(
    not os.environ.get("TIMM_CMT_EXPORTS"),
    reason="NOT TESTED: the demo's accuracy in 8 bits, a minute each; set TIMM_CMT_EXPORTS=1",
)
def test_8_bits_keep_the_demo_s_accuracy(to, demo, exported, digits, tmp_path):
    from test_export_command import FORMATS, infer, need

    from timm_cmt.cli.export import INT8

    need(to, *INT8[to])
    _, folder = demo
    for path in folder.glob("digits/train/*/*0.png"):
        copied = tmp_path / "calibration" / path.parent.name / path.name
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copied)
    out = tmp_path / f"int8{FORMATS[to][0]}"
    options = ["--to", to, "--out", str(out), "--int8", "--calibrate", str(tmp_path / "calibration")]
    assert main(["export", str(folder / "last.pth.tar"), *options]) == 0
    size = sum(path.stat().st_size for path in tmp_path.glob("int8.*"))
    model = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    assert size < 0.32 * 4 * sum(p.numel() for p in model.parameters())
    images, labels = digits("validation")
    with torch.inference_mode():
        expected = model(images).argmax(1)
        actual = infer(to, out, images)[0].argmax(1)
    assert (actual == labels).float().mean() >= (expected == labels).float().mean() - 0.005
    assert (actual == expected).float().mean() >= 0.99
