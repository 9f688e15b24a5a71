"""What runs a folded CMT beside torch's eager mode, as benchmarks/runtimes.py does: each gives what the model gives.

test_export_command.py has the formats of `timm-cmt export`: torch.export, ONNX, OpenVINO, ExecuTorch and LiteRT.
"""

import copy
import os

import pytest
import timm
import torch
from common import SMALL, images, need
from timm.utils import reparameterize_model


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("cmt_ti", **SMALL).eval()


@pytest.fixture(scope="module")
def folded(model) -> torch.nn.Module:
    return reparameterize_model(model).requires_grad_(False)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def assert_agrees(actual: torch.Tensor, model: torch.nn.Module, x: torch.Tensor, tolerance: float = 1e-4) -> None:
    expected = model(x)
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def test_torchscript(folded, tmp_path):
    torch.jit.script(folded).save(tmp_path / "model.ts")
    x = images(3, height=96)
    assert_agrees(torch.jit.load(tmp_path / "model.ts")(x), folded, x)


@pytest.mark.skipif(
    not os.environ.get("TIMM_CMT_EXPORTS"), reason="NOT TESTED: AOTInductor, a minute; set TIMM_CMT_EXPORTS=1"
)
def test_aotinductor(folded, tmp_path):
    x, path = images(2), str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(torch.export.export(folded, (x,)), package_path=path)
    assert_agrees(torch._inductor.aoti_load_package(path)(x), folded, x)


def test_openvino_by_torch_compile(folded):
    need("openvino.torch", "openvino")
    options = dict(aot_autograd=True, config={"INFERENCE_PRECISION_HINT": "f32"})
    torch._dynamo.reset()
    compiled = torch.compile(folded, backend="openvino", dynamic=False, options=options)
    x = images(2)
    assert_agrees(compiled(x), folded, x)


def test_nncf_compresses_the_weights_to_8_bits(folded):
    nncf, openvino = need("nncf"), need("openvino")
    x = images(2)
    converted = nncf.compress_weights(openvino.convert_model(torch.export.export(folded, (x,))))
    compiled = openvino.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert_agrees(torch.from_numpy(compiled(x.numpy())[0]), folded, x, tolerance=0.1)


def test_ncnn_by_pnnx(folded, tmp_path):
    pnnx, ncnn = need("pnnx"), need("ncnn")
    x = images(1)
    pnnx.export(folded, str(tmp_path / "model.pt"), (x,), fp16=False)
    net = ncnn.Net()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.load_param(str(tmp_path / "model.ncnn.param"))
    net.load_model(str(tmp_path / "model.ncnn.bin"))
    extractor = net.create_extractor()
    extractor.input("in0", ncnn.Mat(x[0].numpy()).clone())
    assert_agrees(torch.tensor(extractor.extract("out0")[1].numpy())[None], folded, x)


def test_tvm(folded):
    tvm = need("tvm", "apache-tvm")
    from tvm.relax.frontend.torch import from_exported_program

    x = images(1)
    compiled = tvm.compile(from_exported_program(torch.export.export(folded, (x,))), tvm.target.Target("llvm"))
    machine = tvm.relax.VirtualMachine(compiled, tvm.cpu())
    assert_agrees(torch.from_numpy(machine["main"](tvm.runtime.from_dlpack(x))[0].numpy()), folded, x)


@pytest.mark.parametrize("traced", [False, True])
def test_core_ml_is_written(traced, folded, tmp_path):
    """Only a Mac can run it."""
    coremltools = need("coremltools")
    x = images(1)
    if traced:
        source, given = torch.jit.trace(folded, x), dict(inputs=[coremltools.TensorType(name="x", shape=x.shape)])
    else:
        source, given = torch.export.export(folded, (x,)).run_decompositions({}), {}
    coremltools.convert(source, **given).save(str(tmp_path / "model.mlpackage"))
    (output,) = coremltools.utils.load_spec(str(tmp_path / "model.mlpackage")).description.output
    assert list(output.type.multiArrayType.shape) in ([1, 10], [])


def test_torchao_makes_the_linear_layers_8_bits(folded):
    quantization = need("torchao.quantization", "torchao")
    quantized = copy.deepcopy(folded)
    quantization.quantize_(quantized, quantization.Int8WeightOnlyConfig())
    x = images(2)
    assert_agrees(quantized(x), folded, x, tolerance=0.1)


def test_torch_pruning_halves_the_hidden_layers(model):
    pruning = need("torch_pruning", "torch-pruning")
    pruned = copy.deepcopy(model).requires_grad_()
    x = images(1)
    ignored = [pruned.head]
    with torch.enable_grad():  # it follows the gradient's graph
        importance = pruning.importance.MagnitudeImportance(p=2)
        pruning.pruner.BasePruner(pruned, x, importance, pruning_ratio=0.5, ignored_layers=ignored).step()
    kept = sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in model.parameters())
    assert 0.2 < kept < 0.6
    assert pruned(x).isfinite().all() and pruned(x).shape == (1, 10)
