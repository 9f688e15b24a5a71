"""The layers: what is done for speed changes nothing, tools find what they know, and torch's transforms work."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from common import SMALL, images
from timm.layers import set_fused_attn
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torchvision.models.feature_extraction import create_feature_extractor

from timm_cmt import layers


def make(seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model("cmt_ti", **{**SMALL, **kwargs}).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def by_the_formula(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


# ---- plain classes, which tools compare


def test_every_layer_with_weights_is_of_a_class_that_tools_know():
    own = {"CMT", "RelPosBias"}
    types = {type(m) for m in make().modules() if next(m.parameters(recurse=False), None) is not None}
    assert {t.__name__ for t in types if not t.__module__.startswith(("torch.nn", "timm.layers"))} == {"RelPosBias"}
    assert not own & {t.__name__ for t in types} - {"RelPosBias"}
    assert {nn.Linear, nn.Conv2d, nn.BatchNorm2d} <= types


def test_torch_s_int8_finds_every_linear_layer():
    model = make()
    linear = sum(type(module) is nn.Linear for module in model.modules())
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    found = sum(isinstance(module, torch.ao.nn.quantized.dynamic.Linear) for module in quantized.modules())
    assert found == linear == 3 * 5 + 1


def test_children_but_the_last_give_the_pooled_features():
    model = make()
    with torch.no_grad():
        pooled = nn.Sequential(*list(model.children())[:-1])(images())
        assert torch.equal(pooled, model.forward_head(model.forward_features(images()), pre_logits=True))


# ---- evaluation in place


def test_evaluation_in_place_gives_the_same_and_hooks_turn_it_off():
    model = make()
    hooked = copy.deepcopy(model)
    seen = []
    for name, module in hooked.named_modules():
        module.register_forward_hook(lambda _, args, out, name=name: seen.append((name, out, out.clone())))
    with torch.no_grad():
        torch.testing.assert_close(model(images()), hooked(images()), rtol=1e-4, atol=1e-4)
    called = {name.rpartition(".")[2] for name, *_ in seen}
    assert {"act", "norm", "conv", "conv1", "dwconv", "conv2", "lpu", "attn", "q", "kv", "sr", "proj"} <= called
    for name, out, then in seen:
        assert torch.equal(out, then), f"what a hook on {name} kept was overwritten"


def test_a_hook_of_all_modules_keeps_what_it_saw():
    model, seen = make(), []
    handle = nn.modules.module.register_module_forward_hook(lambda _, args, out: seen.append((out, out.clone())))
    try:
        with torch.no_grad():
            model(images())
    finally:
        handle.remove()
    assert seen and all(torch.equal(out, then) for out, then in seen)


@pytest.mark.parametrize("kind", ["forward", "full_backward"])
def test_a_hook_on_gelu_sees_maps(kind):
    model, shapes = make(), []
    for module in (model.stem.conv2, model.stages[0].blocks[0].mlp.conv2):
        register = getattr(module.act, f"register_{kind}_hook")
        register(lambda _, args, out: shapes.append(tuple((out[0] if isinstance(out, tuple) else out).shape)))
    model(images()).sum().backward()
    hidden = model.stages[0].blocks[0].mlp.conv2.norm.num_features
    assert sorted(shapes) == sorted([(4, 16, 32, 32), (4, hidden, 16, 16)])


def test_a_replaced_forward_is_called():
    model, seen = make(), []
    layer = model.stages[0].blocks[0].mlp.dwconv.norm
    forward, layer.forward = layer.forward, lambda x: seen.append("offloaded") or forward(x)
    with torch.no_grad():
        model(images())
    assert seen == ["offloaded"]


def test_training_statistics_move_once_without_gradients():
    model = make().train()
    with torch.no_grad():
        model(images())
    assert all(int(m.num_batches_tracked) == 1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_dropout_that_is_on_in_evaluation_drops():
    model = make(proj_drop_rate=0.5)
    with torch.no_grad():
        assert torch.equal(model(images()), model(images()))
        model.stages[0].blocks[0].mlp.dwconv.drop.train()
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


@pytest.mark.parametrize("name", ["stem.conv2.act", "stages.0.blocks.0.mlp.dwconv.act", "stages.0.blocks.0.mlp.norm"])
def test_a_layer_that_is_taken_out_is_out(name):
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


def test_no_images():
    with torch.no_grad():
        assert make()(images()[:0]).shape == (0, 10)


def test_what_is_no_batch_of_images_is_named():
    with pytest.raises(ValueError, match=r"takes images \[B, C, H, W\], not a tensor of 3 dimensions"):
        make()(images()[0])


# ---- attention


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


@pytest.mark.parametrize("fused", [True, False])
def test_attention_drops_where_its_dropout_is_in_training(fused):
    set_fused_attn(fused)
    try:
        model = make(attn_drop_rate=0.5)
    finally:
        set_fused_attn(True)
    dropouts = [module.attn_drop for module in model.modules() if hasattr(module, "attn_drop")]
    with torch.no_grad():
        for dropout in dropouts:
            dropout.train()
        assert not torch.equal(model(images()), model(images()))  # Monte Carlo dropout
        for stage in model.stages:
            for block in stage.blocks:
                block.attn.training = True
        for dropout in dropouts:
            dropout.eval()
        assert torch.equal(model(images()), model(images()))


def test_attention_by_the_formula_calls_its_dropout():
    set_fused_attn(False)
    try:
        model = make(attn_drop_rate=0.3)
    finally:
        set_fused_attn(True)
    called = []
    for module in model.modules():
        if hasattr(module, "attn_drop"):
            module.attn_drop.register_forward_hook(lambda *_: called.append(1))
    out = model(images())
    assert len(called) == 5
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    torch.testing.assert_close(model(images()), out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["script", "export"])
def test_scripted_and_exported_inference_reaches_the_fused_kernel(how):
    model = make()
    with torch.no_grad():
        run = torch.jit.script(model) if how == "script" else torch.export.export(model, (images(),)).module()
        run(images()), run(images())
        with torch.profiler.profile() as profiler:
            run(images())
    assert any("flash_attention_for_cpu" in event.key for event in profiler.key_averages())


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 has no fake GPU where there is no real one")
@pytest.mark.parametrize(
    ("channels", "compiled", "gradients", "is_fused"),
    [(64, False, False, True), (64, False, True, True), (64, True, False, True), (64, True, True, False)]
    + [(46, False, False, False), (46, False, True, False)],
)
def test_on_a_gpu_attention_is_fused_where_heads_fit_unless_compiled_with_gradients(
    channels, compiled, gradients, is_fused, monkeypatch
):
    calls, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kw: calls.append(args) or sdpa(*args, **kw))
    monkeypatch.setattr(layers, "_is_recorded", lambda: compiled)
    with FakeTensorMode(), torch.set_grad_enabled(gradients):
        q, k, v = (torch.empty(2, 1, n, channels, device="cuda", dtype=torch.bfloat16) for n in (16, 4, 4))
        bias = torch.empty(1, 1, 16, 4, device="cuda", dtype=torch.bfloat16, requires_grad=gradients)
        assert layers.attend(q, k, v, bias, channels**-0.5, 0.0).shape == q.shape
    assert bool(calls) == is_fused


# ---- torch.func, forward-mode derivatives, FX, traces


def test_derivatives_of_the_input_by_torch_func():
    model = make()
    x = images(2).requires_grad_()
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    x = x.detach()
    torch.testing.assert_close(torch.func.grad(lambda x: model(x).sum())(x), expected, rtol=1e-3, atol=1e-4)
    out, vjp = torch.func.vjp(model, x)
    torch.testing.assert_close(vjp(torch.ones_like(out))[0], expected, rtol=1e-3, atol=1e-4)
    jacobian = torch.func.jacrev(lambda x: model(x)[:, :3].sum(0))(x)
    assert jacobian.shape == (3, *x.shape)


def test_forward_mode_derivatives_without_backward_ones():
    model = by_the_formula(make().double())  # the fused kernel has no such derivative
    x = images().double()
    tangent = torch.randn_like(x)
    with torch.no_grad():
        with forward_ad.dual_level():
            out = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
        expected = (model(x + 1e-6 * tangent) - model(x - 1e-6 * tangent)) / 2e-6
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "stem.conv2.norm.weight",
        "stages.0.rel_pos_bias.weight",
        "stages.0.blocks.0.mlp.dwconv.norm.weight",
        "head.weight",
    ],
)
def test_vmap_over_one_parameter(name):
    model = make()
    param, x = model.get_parameter(name).detach(), images()
    with torch.no_grad():
        run = torch.func.vmap(lambda value: torch.func.functional_call(model, {name: value}, (x,)))
        out = run(torch.stack([param, param + 1]))
        assert not torch.equal(out[0], out[1])
        torch.testing.assert_close(out[0], model(x), rtol=1e-3, atol=1e-3)


def test_fx_traces_the_model_and_the_trace_takes_any_size():
    model = make()
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        for x in (images(), images(height=96, width=64)):
            torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="too small"):
            traced(images(height=31))


def test_torchvision_s_feature_extractor_traces_the_model():
    model = make()
    extractor = create_feature_extractor(model, ["stages.1", "final_conv"])
    with torch.no_grad():
        out = extractor(images())
        torch.testing.assert_close(out["stages.1"], model.forward_intermediates(images())[1][2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out["final_conv"], model.forward_features(images()), rtol=1e-4, atol=1e-4)


def test_fx_quantization_traces_the_model():
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    prepared = prepare_fx(make(), get_default_qconfig_mapping("x86"), (images(),))
    assert prepared(images()).shape == (4, 10)


def test_a_trace_is_right_at_its_size_and_fails_at_others():
    model = make()
    traced = torch.jit.trace(model, images())
    with torch.no_grad():
        torch.testing.assert_close(traced(images(3)), model(images(3)), rtol=1e-4, atol=1e-4)
        for height, width in [(32, 128), (128, 32), (96, 96)]:  # the first two have as many tokens as 64 x 64
            with pytest.raises(RuntimeError, match="expand"):
                traced(images(height=height, width=width))
        scripted = torch.jit.script(model)
        x = images(height=32, width=128)
        torch.testing.assert_close(scripted(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_trace_with_gradients_in_bfloat16_passes_its_check():
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        torch.jit.trace(make(), images())
