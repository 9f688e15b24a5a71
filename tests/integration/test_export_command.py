"""timm-cmt export: each file, read by the program that it is for, gives what the model gives and says what it is."""

import importlib.util
import json
import os
import sys
import zipfile

import pytest
import timm
import torch
from common import images
from PIL import Image
from torch import Tensor

from timm_cmt.cli import export, main, quantize
from timm_cmt.cli.convert import convert
from timm_cmt.cli.predict import read_picture

NAMES = ["cat", 'dog, a "good" one', "é"]
FORMATS = export.FORMATS
OLD = torch.__version__.startswith("2.6.")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """The folder of a model with names for its classes, and a picture."""
    folder = tmp_path_factory.mktemp("desk")
    torch.manual_seed(0)
    model = timm.create_model("cmt_ti", img_size=64, num_classes=3, depths=(1, 1, 1, 1))
    torch.save(model.state_dict(), folder / "own.pth")
    (folder / "names.txt").write_text("\n".join(NAMES), encoding="utf-8")
    given = dict(model="cmt_ti", model_kwargs=dict(depths=(1, 1, 1, 1)), mean=[0.4], crop_pct=0.9)
    convert(folder / "own.pth", folder / "mine", given, labels=folder / "names.txt")
    Image.effect_mandelbrot((96, 80), (-2, -1, 1, 1), 50).convert("RGB").save(folder / "image.png")
    for i in range(8):
        path = folder / "pictures" / f"kind {i % 2}" / f"{i}.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_mandelbrot((96, 80), (-2 + i / 8, -1, 1 - i / 8, 1), 50).convert("RGB").save(path)
    (folder / "pictures" / "notes.txt").touch()
    return folder


def need(to: str, *others: str) -> None:
    for package in [*FORMATS[to][1], *others]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"NOT TESTED: export --to {to}; pip install {' '.join([*FORMATS[to][1], *others])}")
    if to == "onnx" and OLD:
        pytest.skip("NOT TESTED: export --to onnx with torch 2.6, whose exporter knows no BatchNorm")


def infer(to: str, path, x: Tensor) -> tuple[Tensor, dict[str, str]]:
    """What the file gives, and what it says of itself; by nothing of this package."""
    if to == "torch":
        extra = dict.fromkeys(["labels", "mean", "crop_pct", "input_size"], "")
        program = torch.export.load(path, extra_files=extra)
        return program.module()(x), extra
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(["logits"], dict(x=x.numpy()))[0]), (
            session.get_modelmeta().custom_metadata_map
        )
    if to == "executorch":
        from executorch.runtime import Runtime

        program = Runtime.get().load_program(path)
        facts = {name: program.load_method(name).execute([])[0] for name in program.method_names - {"forward"}}
        return program.load_method("forward").execute([x])[0], facts
    if to == "litert":
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(str(path))
        interpreter.allocate_tensors()
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x.numpy())
        interpreter.invoke()
        with zipfile.ZipFile(path) as end:
            facts = {name: end.read(name).decode() for name in end.namelist()}
        return torch.from_numpy(interpreter.get_tensor(interpreter.get_output_details()[0]["index"])), facts
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    facts = {
        key: model.get_rt_info(["model_info", key]).astype(str) for key in ("labels", "mean", "crop_pct", "input_size")
    }
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled(x.numpy())[0]), facts


def assert_agrees(to: str, path, desk, sizes) -> dict[str, str]:
    model = timm.create_model(f"local-dir:{desk / 'mine'}", pretrained=True).eval()
    for batch, size in enumerate(sizes, 1):
        x = images(1 if to in export.ONE_IMAGE else batch, 3, *size)
        with torch.no_grad():
            expected = model(x)
            actual, facts = infer(to, path, x)
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
    return facts


@pytest.mark.parametrize("to", FORMATS)
def test_the_file_gives_what_the_model_gives_and_says_how_to_use_it(to, desk, tmp_path, capsys):
    need(to)
    out = tmp_path / f"model{FORMATS[to][0]}"
    assert main(["export", str(desk / "mine"), "--to", to, "--out", str(out), "--images", str(desk / "image.png")]) == 0
    printed = capsys.readouterr()
    assert "largest difference to the model: " in printed.out
    assert "on the pictures given at 64 x 64 pixels" in printed.out
    assert {path.stem for path in tmp_path.iterdir()} == {"model"}
    facts = assert_agrees(to, out, desk, [(64, 64)] * 3)
    facts = {key: json.loads(facts[key]) for key in ("labels", "mean", "crop_pct", "input_size")}
    assert facts == dict(labels=NAMES, mean=[0.4] * 3, crop_pct=0.9, input_size=[3, 64, 64])


def test_onnxruntime_is_left_with_the_transposes_that_attention_needs(desk, tmp_path):
    need("onnx")
    import onnx
    import onnxruntime

    assert main(["export", str(desk / "mine"), "--to", "onnx", "--out", str(tmp_path / "model.onnx")]) == 0
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    nodes = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert nodes.count("LayerNormalization") == 4 * 3
    # Of q, k, v and what comes out of attention, two of the sum after it, and six in all where 46 channels are no 16s.
    assert nodes.count("Transpose") <= 4 * 6 + 6
    assert "Slice" not in nodes  # no arithmetic on sizes


def test_openvino_runs_each_layernorm_by_its_own_kernel(desk, tmp_path):
    need("openvino")
    import openvino

    assert main(["export", str(desk / "mine"), "--to", "openvino", "--out", str(tmp_path / "model.xml")]) == 0
    compiled = openvino.Core().compile_model(tmp_path / "model.xml", "CPU")
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
    assert kinds.count("MVN") == 4 * 3


@pytest.mark.parametrize("to", export.INT8)
def test_8_bits_agree_are_small_and_say_how_to_use_them(to, desk, tmp_path, capsys):
    need(to, *export.INT8[to])
    out = tmp_path / f"model{FORMATS[to][0]}"
    options = ["--to", to, "--out", str(out), "--int8", "--calibrate", str(desk / "pictures")]
    assert main(["export", str(desk / "mine"), *options]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"8 bits, calibrated on 8 pictures in {desk / 'pictures'}: the same class for ")
    model = timm.create_model(f"local-dir:{desk / 'mine'}", pretrained=True).eval()
    x = torch.stack([read_picture(model, path) for path in sorted((desk / "pictures").rglob("*.JPG"))])
    with torch.no_grad():
        actual, facts = infer(to, out, x)
        assert (actual - model(x)).abs().max() <= 0.1 * model(x).abs().max()
    assert json.loads(facts["labels"]) == NAMES
    files = list(tmp_path.iterdir())
    assert {path.stem for path in files} == {"model"}
    weights = out.with_suffix(".bin") if to == "openvino" else out
    assert weights.stat().st_size < 0.32 * 4 * sum(p.numel() for p in model.parameters())


SIZES = [(64, 64), (96, 64), (97, 161), (224, 224), (800, 1333)]


@pytest.mark.parametrize("to", [to for to in FORMATS if to not in export.ONE_IMAGE])
@pytest.mark.skipif(
    not os.environ.get("TIMM_CMT_EXPORTS"),
    reason="NOT TESTED: export --dynamic-size, a minute each; set TIMM_CMT_EXPORTS=1",
)
def test_a_file_for_any_size_gives_what_the_model_gives(to, desk, tmp_path):
    need(to)
    out = tmp_path / f"model{FORMATS[to][0]}"
    assert main(["export", str(desk / "mine"), "--to", to, "--out", str(out), "--dynamic-size"]) == 0
    assert_agrees(to, out, desk, SIZES if to == "torch" else [*SIZES, (32, 32), (33, 47)])


# ---- what can go wrong


def fail(capsys, *arguments) -> str:
    assert main(["export", *map(str, arguments)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("timm-cmt: error: ")
    return error


def test_a_missing_exporter_is_one_line_with_the_command(desk, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openvino", None)
    error = fail(capsys, desk / "mine", "--to", "openvino", "--out", tmp_path / "m.xml")
    assert error.endswith("--to openvino needs what is not installed; pip install openvino")


def test_a_format_of_one_size_refuses_to_be_for_any(desk, tmp_path, capsys):
    error = fail(capsys, desk / "mine", "--to", "litert", "--out", tmp_path / "m.tflite", "--dynamic-size")
    assert error.endswith("--to litert writes a file for images of one size; give --size instead of --dynamic-size")


def test_another_suffix_and_a_file_that_is_there_are_refused(desk, tmp_path, capsys):
    assert f"give {tmp_path / 'm.pt2'}" in fail(capsys, desk / "mine", "--to", "torch", "--out", tmp_path / "m.onnx")
    (tmp_path / "m.pt2").touch()
    assert "is there already" in fail(capsys, desk / "mine", "--to", "torch", "--out", tmp_path / "m.pt2")


def test_a_file_that_differs_from_the_model_is_not_kept(desk, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "trace", lambda *_: None)
    monkeypatch.setitem(export.WRITERS, "torch", lambda *_: lambda x: torch.zeros(len(x), 3))
    error = fail(capsys, desk / "mine", "--to", "torch", "--out", tmp_path / "m.pt2")
    assert "differs from the model by 1.0e+00 of its largest output at 64 x 64 pixels" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(OLD, reason="NOT TESTED: export --to onnx with torch 2.6, whose exporter knows no BatchNorm")
def test_what_8_bits_need_is_one_line(desk, tmp_path, monkeypatch, capsys):
    def fail_to(to, *options):
        return fail(capsys, desk / "mine", "--to", to, "--out", tmp_path / f"m{FORMATS[to][0]}", *options)

    assert "--int8 and --calibrate FOLDER go together" in fail_to("onnx", "--int8")
    assert "go together" in fail_to("onnx", "--calibrate", desk)
    int8 = ["--int8", "--calibrate"]
    assert "is for --to onnx and openvino alone" in fail_to("torch", *int8, desk)
    assert f"{desk / 'none'} is no folder" in fail_to("onnx", *int8, desk / "none")
    (tmp_path / "empty").mkdir()
    assert f"there is no picture in {tmp_path / 'empty'}; name a folder with" in fail_to(
        "onnx", *int8, tmp_path / "empty"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nncf" else name)
    assert fail_to("openvino", *int8, desk / "pictures").endswith("is not installed; pip install nncf")


def test_of_many_pictures_300_are_taken_from_all_folders(tmp_path):
    for i in range(400):
        path = tmp_path / str(i // 40) / f"{i:03}.png"
        path.parent.mkdir(exist_ok=True)
        path.touch()
        path.with_name(f"._{path.name}").touch()  # what a Mac adds on a stick, and no picture
    found = quantize.find_pictures(tmp_path)
    assert not any(path.name.startswith(".") for path in found)
    assert len(found) == len(set(found)) == 300
    assert {path.parent.name for path in found} == {str(i) for i in range(10)}


def test_8_bits_that_do_not_agree_are_refused():
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    assert quantize.compare([(logits, logits)]) == (
        "the same class for 100.0% of 50 pictures, correlation of the logits 1.0000"
    )
    for other in (logits.flip(0), torch.full_like(logits, torch.nan)):
        with pytest.raises(RuntimeError, match="8 bits are too few here .* at least 0.98 is asked for"):
            quantize.compare([(logits, other)])
