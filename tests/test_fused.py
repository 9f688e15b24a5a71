"""What is done for speed changes nothing: in-place inference, channels-last memory, the products' other kernels."""

import copy

import pytest
import timm
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from common import SMALL, images
from torch import nn

from timm_cmt import cmt
from timm_cmt.cmt import Reduction, TokenLinear, is_formula_faster
from timm_cmt.fused import ChannelsLastGELU


def make(seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model("cmt_ti", **{**SMALL, **kwargs}).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_inference_in_place_gives_the_same_bits(batch, autocast):
    model = make()
    hooked = copy.deepcopy(model)
    for module in hooked.modules():
        module.register_forward_hook(lambda *_: None)  # which turns it off
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert torch.equal(model(images(batch)), hooked(images(batch)))


@pytest.mark.parametrize("name", ["conv1", "act1", "norm1", "dwconv", "act2", "norm2", "conv2"])
@pytest.mark.parametrize("recompute", [False, True])
def test_hooks_are_called_and_what_they_keep_stays(name, recompute):
    model = make(recompute_act=recompute).train(recompute)
    kept = []
    layer = model.stages[0].blocks[0].mlp.get_submodule(name)
    layer.register_forward_hook(lambda _, args, out: kept.append((args[0], args[0].clone(), out, out.clone())))
    with torch.set_grad_enabled(recompute):
        model(images())
    ((given, given_then, out, out_then),) = kept
    assert torch.equal(given, given_then) and torch.equal(out, out_then)


def test_hooks_on_all_modules_and_replaced_forwards_are_called():
    model, seen = make(), []
    with torch.nn.modules.module.register_module_forward_pre_hook(lambda module, _: seen.append(module)):
        with torch.no_grad():
            model(images())
    layer = model.stages[0].blocks[0].mlp.norm1
    assert layer in seen
    forward, layer.forward = layer.forward, lambda x: seen.append("offloaded") or forward(x)
    with torch.no_grad():
        model(images())
    assert seen[-1] == "offloaded"


def test_training_statistics_move_once_without_gradients():
    model = make().train()
    with torch.no_grad():
        model(images())
    assert all(int(m.num_batches_tracked) == 1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_dropout_that_is_on_in_evaluation_drops():
    model = make(proj_drop_rate=0.5)
    with torch.no_grad():
        assert torch.equal(model(images()), model(images()))
        for stage in model.stages:
            for block in stage.blocks:
                block.mlp.drop1.train()
        assert not torch.equal(model(images()), model(images()))


def test_the_images_are_left_alone():
    x = images().contiguous(memory_format=torch.channels_last)
    before = x.clone()
    with torch.no_grad():
        make()(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_maps_lie_channels_last_all_the_way(channels, memory_format):
    model = make(in_chans=channels)
    x = images(channels=channels).contiguous(memory_format=memory_format)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for feature in model.forward_intermediates(x, intermediates_only=True):
                assert feature.is_contiguous(memory_format=torch.channels_last)


def test_gelu_is_gelu():
    x = images().requires_grad_()
    expected = F.gelu(x)
    torch.testing.assert_close(ChannelsLastGELU()(x), expected)
    weights = torch.randn_like(x)
    actual, expected = (torch.autograd.grad((f(x) * weights).sum(), x)[0] for f in (ChannelsLastGELU(), F.gelu))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("onednn", [False, True])
def test_the_product_of_tokens_is_that_of_linear(batch, dtype, onednn, monkeypatch):
    if onednn and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("NOT TESTED: oneDNN's products in bfloat16; run this on a processor with AVX-512")
    monkeypatch.setattr(cmt, "ONEDNN_OVER_MKL", onednn)  # which is the processor's to say
    torch.manual_seed(0)
    layer = TokenLinear(12, 20).to(dtype)
    x = torch.randn(batch, 1, 7, 12, dtype=dtype).permute(0, 3, 1, 2).requires_grad_()
    tokens = x.flatten(2).transpose(1, 2)  # of a batch of one, its strides tell convolutions nothing
    out, expected = layer(tokens), F.linear(tokens, layer.weight, layer.bias)
    torch.testing.assert_close(out, expected)
    assert out.stride()[1:] == expected.stride()[1:]  # attention's fused kernel wants a token's channels side by side
    weights = torch.randn_like(out)
    given = (x, layer.weight, layer.bias)
    for actual, wanted in zip(
        torch.autograd.grad((out * weights).sum(), given), torch.autograd.grad((expected * weights).sum(), given)
    ):
        torch.testing.assert_close(actual, wanted)


def test_attention_by_the_formula_is_for_what_the_fused_kernels_do_not_take():
    half, full = torch.float16, torch.float32
    head_dims = dict(cmt_ti=46, cmt_xs=52, cmt_s=64, cmt_b=76, cmt_l=88)
    on_cuda = {name for name, dim in head_dims.items() if is_formula_faster("cuda", half, 2 * dim, True)}
    assert on_cuda == {"cmt_ti", "cmt_xs", "cmt_b"}
    assert [name for name, dim in head_dims.items() if is_formula_faster("cuda", full, 4 * dim, True)] == ["cmt_ti"]
    assert not is_formula_faster("cpu", full, 4 * 46, bias_grad=False)
    assert is_formula_faster("cpu", full, 4 * 64, bias_grad=True)
    assert is_formula_faster("cpu", torch.bfloat16, 2 * 64, bias_grad=False)


def test_attention_s_bias_is_not_copied_for_each_image(monkeypatch):
    masks, attention = [], F.scaled_dot_product_attention

    def noted(*args, attn_mask: torch.Tensor, **kwargs) -> torch.Tensor:
        masks.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    model = make()
    with torch.no_grad():
        model(images())
    biases = [stage.rel_pos_bias.weight for stage in model.stages for _ in stage.blocks]
    assert [mask.data_ptr() for mask in masks] == [bias.data_ptr() for bias in biases]


@pytest.mark.parametrize("autocast", [True, False])
def test_the_reduction_in_bfloat16_is_the_convolution_s(autocast):
    torch.manual_seed(0)
    layer = Reduction(6, 2) if autocast else Reduction(6, 2).bfloat16()
    x = torch.randn(2, 6, 8, 9).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    expected = F.conv2d(x.float(), layer.weight.float(), layer.bias.float(), stride=2, groups=6)
    torch.testing.assert_close(out.float(), expected, rtol=0.01, atol=0.01)
    grads = torch.autograd.grad(out.sum(), (x, layer.weight)), torch.autograd.grad(expected.sum(), (x, layer.weight))
    for actual, wanted in zip(*grads):
        assert actual.dtype == wanted.dtype
        torch.testing.assert_close(actual, wanted, rtol=0.02, atol=0.02)


def test_forward_mode_derivatives_without_backward_ones():
    model = make().double()
    for stage in model.stages:
        for block in stage.blocks:
            block.attn.fused_attn = False  # whose kernel has no such derivative
    x = images().double()
    tangent = torch.randn_like(x)
    with torch.no_grad():
        with forward_ad.dual_level():
            out = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
        expected = (model(x + 1e-6 * tangent) - model(x - 1e-6 * tangent)) / 2e-6
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-6)


def test_a_forward_mode_derivative_of_a_convolution_alone():
    model = make().double()
    name = "stages.0.blocks.0.mlp.dwconv.weight"
    weight = model.get_parameter(name).detach()
    tangent = torch.randn_like(weight)

    def run(value: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, {name: value}, (images().double(),))

    for stage in model.stages:
        for block in stage.blocks:
            block.attn.fused_attn = False
    with torch.no_grad():
        with forward_ad.dual_level():
            out = forward_ad.unpack_dual(run(forward_ad.make_dual(weight, tangent))).tangent
        expected = (run(weight + 1e-6 * tangent) - run(weight - 1e-6 * tangent)) / 2e-6
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["stem.act1", "stages.0.blocks.0.mlp.act1", "stages.0.blocks.0.mlp.act2"])
def test_an_activation_that_is_taken_out_is_out(name):
    model = make()
    model.set_submodule(name, nn.Identity())
    expected = model(images()).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(images()), expected)


def test_batchnorm_without_running_statistics():
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    expected = model(images()).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(images()), expected)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "name", ["stem.norm1.weight", "stages.0.rel_pos_bias.weight", "stages.0.blocks.0.mlp.dwconv.weight", "head.weight"]
)
def test_vmap_over_one_parameter(name, recompute):
    model = make(recompute_act=recompute).train(recompute).bfloat16()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # whose statistics cannot move under vmap
    param, x = model.get_parameter(name).detach(), images().bfloat16()
    with torch.set_grad_enabled(recompute):
        run = torch.func.vmap(lambda value: torch.func.functional_call(model, {name: value}, (x,)))
        out = run(torch.stack([param, param + 1]))
        assert not torch.equal(out[0], out[1])
        torch.testing.assert_close(out[0], model(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_trace_with_gradients_in_bfloat16_passes_its_check(autocast):
    model, x = (make(), images()) if autocast else (make().bfloat16(), images().bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast, cache_enabled=False):
        torch.jit.trace(model, x)


def test_no_images():
    with torch.no_grad():
        assert make()(images()[:0]).shape == (0, 10)
