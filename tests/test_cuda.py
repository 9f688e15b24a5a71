"""What somebody with a GPU needs to know: that the models there are what they are on the CPU, and what they take.

It needs pytest, torch, timm, numpy and this package, nothing else. Without a GPU it is skipped, and
`TIMM_CMT_TEST_DEVICE=cpu pytest tests/test_cuda.py` runs the same lines on the CPU, to find mistakes in them.
"""

import copy
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from common import MODELS, PARITY, SIZES, SMALL, authors_weights, images, parity_input
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from timm_cmt import resize_rel_pos_bias

DEVICE = os.environ.get("TIMM_CMT_TEST_DEVICE", "cuda")
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip(
        "NOT TESTED: a GPU (outputs and gradients against the CPU's, AMP, channels-last, torch.compile, recompute_act, "
        "reparameterization, other image sizes, memory). On a machine with one, run pytest tests/test_cuda.py",
        allow_module_level=True,
    )

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
BACKEND = "inductor" if DEVICE == "cuda" else "aot_eager"  # for the CPU, inductor compiles for minutes
OTHER_SIZES = [(47, 61), (96, 160), (117, 192)]  # pixels; the small models are built for 64 x 64
# Largest relative errors. A half has 11 bits or 8, and what rounds them away adds up over the layers.
FLOAT32, HALF = 1e-4, {torch.float16: 0.02, torch.bfloat16: 0.1}


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """Convolutions and products in float32 itself, not in TF32, which has ten bits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture
def report(record_property) -> Callable[[str], None]:
    """Prints a line of figures after the tests."""
    return lambda line: record_property("figures", line)


def make(name: str = "cmt_ti", seed: int = 0, **kwargs) -> nn.Module:
    """A small model on the CPU, in evaluation, whose BatchNorms have seen something."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**SMALL, **kwargs}).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def make_as_the_authors(name: str) -> nn.Module:
    """A whole model on the CPU, with the weights that tests/parity has outputs for."""
    model = timm.create_model(name).eval()
    model.load_state_dict(authors_weights(name))
    return model


def sized(size: tuple[int, int], batch: int = 2) -> Tensor:
    return images(batch, 3, *size)


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference as a fraction of the largest value; one nan makes it nan, which is below no limit."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def train(model: nn.Module, x: Tensor) -> Tensor:
    """One forward and backward pass; returns the loss."""
    labels = torch.arange(len(x), device=x.device) % model.num_classes
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    return loss.detach()


def assert_same_gradients(actual: nn.Module, expected: nn.Module, tolerance: float) -> None:
    """By the norm of each; those that are zero but for rounding are measured by the largest."""
    largest = max(param.grad.double().norm().item() for param in expected.parameters())
    for (name, a), b in zip(actual.named_parameters(), expected.parameters()):
        difference = (a.grad.double().cpu() - b.grad.double().cpu()).norm().item()
        assert difference <= tolerance * (b.grad.double().norm().item() + 1e-2 * largest), name


# ---- outputs


@pytest.mark.parametrize("name", ["cmt_ti", "cmt_s"])
def test_outputs_are_those_of_the_authors_code(name, device):
    size = SIZES[name]
    expected = np.load(Path(PARITY) / f"expected_{name}_{size}.npz")
    model, x = make_as_the_authors(name).to(device), parity_input(size).to(device)
    with torch.inference_mode():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        logits = model.forward_head(features)
    assert error(pooled, torch.from_numpy(expected["pooled"])) < FLOAT32
    assert error(logits, torch.from_numpy(expected["logits"])) < FLOAT32


@pytest.mark.parametrize("name", MODELS)
def test_every_variant_has_the_cpu_s_outputs(name, device):
    model, x = make(name), images()
    with torch.no_grad():
        expected = model(x)
        assert error(model.to(device)(x.to(device)), expected) < FLOAT32


@LAYOUTS
@pytest.mark.parametrize("channels", [1, 3])
def test_either_layout_of_images_and_model_gives_the_cpu_s_outputs(channels, layout, device):
    model, x = make(in_chans=channels), images(channels=channels)
    with torch.no_grad():
        expected = model(x)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            other = copy.deepcopy(model).to(device, memory_format=memory_format)
            assert error(other(x.to(device).contiguous(memory_format=layout)), expected) < FLOAT32


def test_a_model_made_on_the_device_takes_a_cpu_s_checkpoint_of_another_size(device):
    model, size = make(), (96, 160)
    other = timm.create_model("cmt_ti", **{**SMALL, "img_size": size}, device=device).eval()
    assert {tensor.device.type for tensor in other.state_dict().values()} == {device.type}
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert error(other(sized(size).to(device)), model(sized(size))) < FLOAT32
        assert error(other.cpu()(sized(size)), model(sized(size))) < FLOAT32


# ---- gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@LAYOUTS
def test_gradients_and_running_statistics_are_the_cpu_s(layout, dtype, device):
    expected, x = make().train().to(dtype), images().to(dtype)
    actual = copy.deepcopy(expected).to(device, memory_format=layout)
    loss = train(actual, x.to(device).contiguous(memory_format=layout))
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    assert error(loss, train(expected, x)) < tolerance
    assert_same_gradients(actual, expected, tolerance)
    for (name, a), b in zip(actual.named_buffers(), expected.buffers()):
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance, msg=name)


# ---- half precision


@HALVES
@LAYOUTS
def test_evaluation_under_autocast_follows_float32(layout, dtype, device):
    model = make().to(device, memory_format=layout)
    for size in [(64, 64), (96, 160)]:
        x = sized(size).to(device).contiguous(memory_format=layout)
        with torch.no_grad():
            expected = model(x)
            with torch.autocast(device.type, dtype=dtype):
                actual = model(x)
        assert actual.dtype == dtype and error(actual, expected) < HALF[dtype]


@HALVES
def test_evaluation_in_half_precision_follows_float32(dtype, device):
    model, x = make().to(device), sized((96, 160)).to(device)
    with torch.no_grad():
        expected = model(x)
        assert error(model.to(dtype)(x.to(dtype)), expected) < HALF[dtype]


@HALVES
@pytest.mark.parametrize("name, recompute", [("cmt_ti", False), ("cmt_ti", True), ("cmt_s", False)])
def test_training_by_amp_follows_float32(name, recompute, dtype, device):
    losses = []
    for enabled in (False, True):
        model = make(name, recompute_act=recompute, depths=(1, 1, 1, 1)).train().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=enabled and dtype == torch.float16)
        x, labels = images().to(device), torch.arange(4, device=device)
        losses.append([])
        for _ in range(3):
            with torch.autocast(device.type, dtype=dtype, enabled=enabled):
                loss = F.cross_entropy(model(x), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
        assert scaler.get_scale() in (1.0, 1024.0)  # no gradient was infinite, so every step was taken
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=2 * HALF[dtype])


@HALVES
def test_the_resized_bias_stays_float32_under_autocast(dtype, device):
    bias = make().stages[0].rel_pos_bias.to(device)
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype):
        low = bias(20, 24)
    with torch.no_grad():
        assert low.dtype == torch.float32 and torch.equal(low, bias(20, 24))


# ---- attention's kernels


@HALVES
@pytest.mark.parametrize("name", ["cmt_s", "cmt_l"])  # of 64 and of 88 channels a head
def test_heads_of_a_multiple_of_16_bytes_have_a_fused_kernel(name, dtype, device, monkeypatch):
    calls, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kw: calls.append(args) or sdpa(*args, **kw))
    fused = [kernel for kernel in SDPBackend.__members__.values() if kernel.name.endswith("ATTENTION")]
    model = make(name, depths=(1, 1, 1, 1)).to(device)
    with sdpa_kernel(fused), torch.autocast(device.type, dtype=dtype):  # raises where there is none
        with torch.no_grad():
            model(images().to(device))
        assert len(calls) == 4  # a block a stage
        model.train()(images().to(device)).float().square().mean().backward()
    assert len(calls) == (4 if device.type == "cpu" else 8)  # the CPU's has no gradient of the bias
    assert all(param.grad.isfinite().all() for param in model.parameters())


# ---- torch.compile


def test_compiled_evaluation_agrees_at_two_sizes_and_follows_the_weights(device):
    model = make("cmt_s", depths=(1, 1, 1, 1)).to(device)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for size in [(64, 64), (96, 64)]:
            assert error(compiled(sized(size).to(device)), model(sized(size).to(device))) < FLOAT32
        for stage in model.stages:
            stage.rel_pos_bias.weight.mul_(2)
        x = sized((96, 64)).to(device)
        assert error(compiled(x), model(x)) < FLOAT32


def test_compiled_folded_evaluation_under_autocast_follows_float32(device):
    model = make("cmt_s", depths=(1, 1, 1, 1)).to(device)
    x = images().to(device)
    torch.compiler.reset()
    compiled = torch.compile(reparameterize_model(model), backend=BACKEND, fullgraph=True, dynamic=False)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert error(compiled(x), expected) < HALF[torch.bfloat16]


@pytest.mark.parametrize("name, recompute", [("cmt_s", False), ("cmt_ti", True)])  # heads of 64 and of 46 channels
def test_compiled_training_has_the_gradients_of_eager_training(name, recompute, device):
    plain = make(name, depths=(1, 1, 1, 1)).train().to(device)
    other = make(name, depths=(1, 1, 1, 1), recompute_act=recompute).train().to(device)
    torch.compiler.reset()
    x = images().to(device)
    loss = F.cross_entropy(
        torch.compile(other, backend=BACKEND, fullgraph=True, dynamic=False)(x), torch.arange(4, device=device)
    )
    loss.backward()
    assert error(loss, train(plain, x)) < 1e-3
    assert_same_gradients(other, plain, 1e-2)


# ---- recompute_act


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_recompute_act_has_the_gradients_of_plain_training(size, device):
    plain, other = (make(recompute_act=r).train().double().to(device) for r in (False, True))
    x = sized(size).double().to(device)
    assert error(train(other, x), train(plain, x)) < 1e-9
    assert_same_gradients(other, plain, 1e-9)
    for (name, a), b in zip(other.named_buffers(), plain.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


@HALVES
def test_recompute_act_has_the_gradients_of_plain_training_by_amp(dtype, device):
    plain, other = (make(recompute_act=r).train().to(device) for r in (False, True))
    x = images().to(device)
    for model in (plain, other):
        with torch.autocast(device.type, dtype=dtype):
            loss = F.cross_entropy(model(x), torch.arange(4, device=device))
        (loss * 256).backward()
    assert_same_gradients(other, plain, 5 * HALF[dtype])


# ---- reparameterization


@pytest.mark.parametrize("size", [(64, 64), (47, 96)])
@LAYOUTS
def test_a_folded_model_has_the_outputs_of_the_plain_one(layout, size, device):
    model, x = make().to(device, memory_format=layout), sized(size).to(device).contiguous(memory_format=layout)
    with torch.no_grad():
        assert error(reparameterize_model(model)(x), model(x)) < FLOAT32


# ---- any image size


@pytest.mark.parametrize("size", OTHER_SIZES)
def test_evaluation_at_another_size_is_that_of_a_model_built_there(size, device):
    model, x = make(), sized(size)
    built = timm.create_model("cmt_ti", **{**SMALL, "img_size": size}).eval()
    built.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = built(x)
        assert error(built.to(device)(x.to(device)), expected) < FLOAT32
        assert error(model.to(device)(x.to(device)), expected) < FLOAT32
        model.set_input_size(size)
        assert error(model(x.to(device)), expected) < FLOAT32


@pytest.mark.parametrize("size", OTHER_SIZES)
def test_training_at_another_size_has_the_cpu_s_gradients(size, device):
    expected, x = make().train().double(), sized(size).double()
    actual = copy.deepcopy(expected).to(device)
    assert error(train(actual, x.to(device)), train(expected, x)) < 1e-9
    assert_same_gradients(actual, expected, 1e-8)
    if size != (47, 61):  # where there is one key alone, whose softmax is 1
        assert all(stage.rel_pos_bias.weight.grad.any() for stage in actual.stages)


def test_the_gradient_through_the_resizing_is_the_same_every_time(device):
    gradients = []
    for _ in range(5):
        weight = torch.randn(2, 16 * 16, 8 * 8, device=device, generator=torch.Generator(device).manual_seed(0))
        resized = resize_rel_pos_bias(weight.requires_grad_(), (16, 16), (8, 8), (24, 40), (12, 20))
        resized.backward(torch.sin(torch.arange(resized.numel(), device=device)).reshape(resized.shape))
        gradients.append(weight.grad)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients[1:])


# ---- the resized bias is never stale


def by_an_optimizer(weight: nn.Parameter) -> None:
    weight.grad = -weight.detach()
    torch.optim.SGD([weight], lr=1.0).step()


def by_a_fused_optimizer(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=1.0, fused=True).step()


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(2)


def through_data(weight: nn.Parameter) -> None:
    weight.data.mul_(2)


def in_one_number(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight[0, 0, 0] += 100


@pytest.mark.parametrize(
    "change", [by_an_optimizer, by_a_fused_optimizer, in_place, through_data, in_one_number], ids=lambda f: f.__name__
)
def test_a_resized_bias_follows_its_weight_changed(change, device):
    model, size = make().to(device), (96, 160)
    x = sized(size).to(device)
    with torch.no_grad():
        before = model(x)
    change(model.stages[2].rel_pos_bias.weight)
    built = timm.create_model("cmt_ti", **{**SMALL, "img_size": size}, device=device).eval()
    built.load_state_dict(model.state_dict())
    with torch.no_grad():
        after = model(x)
        assert error(after, built(x)) < FLOAT32 and not torch.equal(after, before)


def test_a_resized_bias_follows_a_loaded_checkpoint(device):
    model, x = make().to(device), sized((96, 160)).to(device)
    other = make(seed=1)
    with torch.no_grad():
        model(x)
        model.load_state_dict(other.state_dict())
        assert error(model(x), other.to(device)(x)) < FLOAT32


# ---- memory


def peak_mb(call: Callable[[], object], device: torch.device) -> float:
    """MB that a call takes at most, over what was there before; nan on the CPU, where torch does not tell."""
    if device.type != "cuda":
        call()
        return math.nan
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@pytest.mark.parametrize("enabled", [False, True], ids=["float32", "bfloat16"])
def test_recompute_act_takes_less_memory_at_the_peak(enabled, device, report):
    batch, size, shape = (32, 224, {}) if device.type == "cuda" else (2, 32, dict(depths=(1, 1, 1, 1)))
    x = torch.randn(batch, 3, size, size, device=device)
    peaks = {}
    for way in ("training", "recompute_act", "evaluation"):
        model = timm.create_model("cmt_s", img_size=size, recompute_act=way == "recompute_act", device=device, **shape)
        model.eval() if way == "evaluation" else model.train()

        def step(model: nn.Module = model) -> None:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
                with torch.set_grad_enabled(model.training):
                    out = model(x).float().square().mean()
            if model.training:
                out.backward()

        step()  # so that gradients, and what libraries keep, are there
        peaks[way] = peak_mb(step, device)
    figures = ", ".join(f"{way} {peak:.0f} MB" for way, peak in peaks.items())
    report(f"peak of cmt_s, {batch} images of {size} x {size}, {'bfloat16' if enabled else 'float32'}: {figures}")
    if device.type == "cuda":
        assert peaks["recompute_act"] < 0.75 * peaks["training"]
        assert peaks["evaluation"] < peaks["recompute_act"]


def test_nothing_is_kept_after_evaluations_at_other_sizes(device, report):
    model = make().to(device)

    def evaluate() -> int:
        with torch.no_grad():
            for size in [(192, 192), (96, 320), (256, 256)]:
                assert model(sized(size).to(device)).isfinite().all()
        return torch.cuda.memory_allocated() if device.type == "cuda" else 0

    before = evaluate()  # what libraries keep is there now
    kept = evaluate() - before
    report(f"kept after evaluations at three other sizes: {kept} bytes")
    assert kept <= 2**16
