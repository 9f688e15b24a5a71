"""Any image size where torch compiles or exports the model, and in a process of its own."""

import copy
import os
import subprocess
import sys

import pytest
import timm
import torch
from common import RESIZES, images
from timm.utils import reparameterize_model
from torch import nn

BUILT = 64


def make(img_size=BUILT, seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("cmt_ti", img_size=img_size, num_classes=10, **kwargs).eval()


def sized(size: tuple[int, int], batch: int = 2, channels: int = 3) -> torch.Tensor:
    return images(batch, channels, *size)


@pytest.mark.parametrize("training", [False, True])
def test_compiled_with_no_graph_break(training):
    model = make(depths=(1, 1, 1, 1)).train(training)  # torch takes four times as long for all blocks
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    for size in [(96, 64)] if training else [(BUILT, BUILT), (96, 64)]:  # test_recompute_compiled.py trains at its own
        x = sized(size)
        expected = copy.deepcopy(model)(x)
        actual = compiled(x)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        if training:
            actual.sum().backward()
            assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_compiled_with_sizes_that_torch_makes_symbolic(training):
    # One stage: reasoning about the symbolic sizes of four takes torch a minute.
    stage = make(depths=(1, 1, 1, 1)).stages[0].train(training)
    torch.compiler.reset()
    compiled = torch.compile(stage, fullgraph=True, backend="aot_eager")
    for size in [(32, 32), (48, 40), (40, 56)]:  # from the second on
        x, other = sized(size, channels=16), copy.deepcopy(stage)
        expected, actual = other(x), compiled(x)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        if training:
            stage.zero_grad()
            for output in (expected, actual):
                output.square().sum().backward()
            for (name, a), b in zip(stage.named_parameters(), other.parameters()):
                assert (a.grad - b.grad).norm() <= 1e-3 * b.grad.norm() + 1e-3, name


def test_a_folded_model_compiles_and_exports():
    model = make(depths=(1, 1, 1, 1))
    folded = reparameterize_model(model)
    torch.compiler.reset()
    compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for run in (compiled, torch.export.export(folded, (images(),)).module()):
            torch.testing.assert_close(run(images()), model(images()), rtol=1e-4, atol=1e-4)


def onnx_operators(path) -> set[str]:
    import onnx

    return {node.op_type for node in onnx.load(path).graph.node}


def test_onnx_of_a_model_at_another_size_has_no_interpolation_and_agrees(tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="NOT TESTED: ONNX; pip install onnx onnxruntime onnxscript")
    model, size = make(depths=(1, 1, 1, 1)), (96, 160)
    model.set_input_size(size)
    path = tmp_path / "model.onnx"
    names = dict(input_names=["x"], output_names=["logits"])
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 7):
        batch = torch.export.Dim("batch", min=1, max=64)
        torch.onnx.export(
            model, (sized(size),), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False, **names
        )
    else:  # torch 2.6's new exporter knows no BatchNorm
        torch.onnx.export(model, (sized(size),), path, dynamic_axes=dict(x={0: "batch"}), **names)
    assert not onnx_operators(path) & RESIZES
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for n in (1, 3):
        x = sized(size, batch=n)
        (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            expected = model(x)
        assert (torch.from_numpy(actual) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_torch_export_with_a_dynamic_batch_has_no_interpolation_and_agrees():
    model = make(depths=(1, 1, 1, 1))
    program = torch.export.export(
        model, (sized((BUILT, BUILT)),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    )
    assert "arange" not in str(program.graph)
    for n in (1, 5):
        x = sized((BUILT, BUILT), batch=n)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="NOT TESTED: torch 2.6 cannot export with any size")
def test_torch_export_with_dynamic_sizes_from_the_model_s_own():
    model = make(depths=(1, 1, 1, 1))
    sides = {2: torch.export.Dim("height", min=64, max=4096), 3: torch.export.Dim("width", min=64, max=4096)}
    with torch.no_grad():
        program = torch.export.export(
            model,
            (sized((BUILT, BUILT)),),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64), **sides},),
            prefer_deferred_runtime_asserts_over_guards=True,
        ).module()
        for size in [(BUILT, BUILT), (96, 64), (97, 161), (160, 128)]:
            x = sized(size, batch=3)
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="NOT TESTED: memory; it is read from Linux's /proc")
def test_feature_maps_of_a_detector_s_image_take_under_2_gb():
    # Not getrusage: what a child's counter starts from is the memory of the process that started it.
    code = """
    import timm, torch
    model = timm.create_model("cmt_s", features_only=True).eval()
    with torch.inference_mode():
        shapes = [tuple(x.shape) for x in model(torch.zeros(1, 3, 800, 1344))]
    peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(shapes[-1], int(peak) / 2**20)
    """
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(line[4:] for line in code.splitlines())], capture_output=True, text=True
    )
    assert done.stdout.startswith("(1, 512, 25, 42)"), done.stderr
    assert float(done.stdout.split(")")[1]) < 2
