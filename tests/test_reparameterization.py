"""Reparameterization for inference, as timm's `--reparam` does it: the same outputs from fewer operations."""

import copy
import io

import pytest
import timm
import torch
from common import MODELS, images
from timm.utils import reparameterize_model
from torch import nn


def make(name: str, seed: int = 0, **kwargs) -> nn.Module:
    """A model with statistics and affine parameters as training leaves them: some channels large, some all but dead."""
    torch.manual_seed(seed)
    model = timm.create_model(name, img_size=64, num_classes=10, **kwargs).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.randn_like(module.weight).exp() * torch.randn_like(module.weight).sign())
                module.weight[0], module.weight[1] = 0, 1e-6
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.copy_(torch.randn_like(module.running_var).mul(2).exp())
            elif isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.bias.normal_(std=0.1)
    return model


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (47, 96)])
def test_outputs_are_the_same(name, height, width):
    model, x = make(name), images(height=height, width=width)
    folded = reparameterize_model(model)
    with torch.no_grad():
        for actual, expected in zip(folded.forward_intermediates(x)[1], model.forward_intermediates(x)[1]):
            assert (actual - expected).norm() <= 1e-5 * expected.norm()
        actual, expected = folded(x), model(x)
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


def test_what_can_be_folded_is_folded():
    model = make("cmt_ti")
    folded = reparameterize_model(model)
    blocks = [block for stage in folded.stages for block in stage.blocks]
    assert not any(block.lpu.has_shortcut or block.mlp.has_shortcut for block in blocks)
    reductions = sum(len(stage.blocks) for stage in folded.stages[:3])
    assert norms(folded) == norms(model) - 2 * len(blocks) - reductions - norms(model.conv_head)
    assert norms(model.conv_head) == 1
    assert all(block.lpu.has_shortcut for stage in model.stages for block in stage.blocks)  # it is a copy


def test_folding_twice_changes_nothing():
    folded = reparameterize_model(make("cmt_ti"))
    before = copy.deepcopy(folded.state_dict())
    again = reparameterize_model(folded).state_dict()
    assert before.keys() == again.keys() and all(torch.equal(before[key], again[key]) for key in before)


def test_a_folded_model_saves_loads_scripts_and_compiles():
    model = make("cmt_ti")
    folded = reparameterize_model(model)
    buffer = io.BytesIO()
    torch.save(folded.state_dict(), buffer)
    buffer.seek(0)
    other = reparameterize_model(make("cmt_ti", seed=1))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    torch.compiler.reset()
    compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(images())
        for run in (other, torch.jit.script(folded), compiled, torch.export.export(folded, (images(),)).module()):
            torch.testing.assert_close(run(images()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [True, False])
def test_a_folded_checkpoint_is_no_checkpoint_of_the_model(strict):
    model = make("cmt_ti")
    folded = reparameterize_model(model)
    before = [copy.deepcopy(m.state_dict()) for m in (model, folded)]
    with pytest.raises(RuntimeError, match=r"of a reparameterized model; load it into timm.utils.reparam"):
        model.load_state_dict(before[1], strict=strict)
    with pytest.raises(RuntimeError, match="of a plain one; load it before you reparameterize"):
        folded.load_state_dict(before[0], strict=strict)
    for m, states in zip((model, folded), before):
        assert all(torch.equal(value, states[key]) for key, value in m.state_dict().items())


def test_without_shortcuts_the_norms_are_folded_all_the_same():
    model = make("cmt_ti")
    for module in model.modules():
        if hasattr(module, "has_shortcut"):
            module.has_shortcut = False  # as in the paper's ablations (Table 4)
    folded = reparameterize_model(model)
    assert norms(folded) == norms(reparameterize_model(make("cmt_ti")))
    with torch.no_grad():
        torch.testing.assert_close(folded(images()), model(images()), rtol=1e-4, atol=1e-4)


def test_half_precision_loses_little_more_by_folding():
    model = make("cmt_ti").bfloat16()
    folded = reparameterize_model(model)
    with torch.no_grad():
        expected = copy.deepcopy(model).float()(images())
        errors = [(m(images().bfloat16()).float() - expected).norm() / expected.norm() for m in (model, folded)]
    assert errors[1] < 2 * errors[0]
