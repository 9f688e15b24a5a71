"""Reparameterization for inference, as timm's `--reparam` does it: the same outputs from fewer operations."""

import copy
import io

import pytest
import timm
import torch
from common import MODELS, SMALL, images
from timm.layers import freeze_batch_norm_2d
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm


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


@pytest.mark.parametrize(("name", "height", "width"), [*((name, 64, 64) for name in MODELS), ("cmt_ti", 47, 96)])
def test_outputs_are_the_same(name, height, width):
    model, x = make(name, depths=SMALL["depths"]), images(height=height, width=width)
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
    assert all(type(block.lpu) is nn.Conv2d for block in blocks)
    assert all(type(block.mlp.dwconv.reparam_conv) is nn.Conv2d for block in blocks)
    reductions = sum(len(stage.blocks) for stage in folded.stages[:3])
    assert norms(folded) == norms(model) - 2 * len(blocks) - reductions - norms(model.final_conv)
    assert norms(model.final_conv) == 1
    assert all(block.mlp.dwconv.reparam_conv is None for stage in model.stages for block in stage.blocks)  # a copy


def test_folding_twice_changes_nothing():
    folded = reparameterize_model(make("cmt_ti"))
    before = copy.deepcopy(folded.state_dict())
    again = reparameterize_model(folded).state_dict()
    assert before.keys() == again.keys() and all(torch.equal(before[key], again[key]) for key in before)


def test_a_folded_model_saves_loads_and_scripts():  # integration/test_any_size_compiled.py compiles and exports it
    model = make("cmt_ti")
    folded = reparameterize_model(model)
    buffer = io.BytesIO()
    torch.save(folded.state_dict(), buffer)
    buffer.seek(0)
    other = reparameterize_model(make("cmt_ti", seed=1))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        expected = model(images())
        for run in (other, torch.jit.script(folded)):
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


def test_half_precision_loses_little_more_by_folding():
    model = make("cmt_ti").bfloat16()
    folded = reparameterize_model(model)
    with torch.no_grad():
        expected = copy.deepcopy(model).float()(images())
        errors = [(m(images().bfloat16()).float() - expected).norm() / expected.norm() for m in (model, folded)]
    assert errors[1] < 2 * errors[0]


# ---- what people have done to a model before


def prune_a_tenth(model: nn.Module) -> None:
    prune.l1_unstructured(model.stages[0].blocks[0].lpu.conv, "weight", 0.1)
    prune.l1_unstructured(model.stages[1].blocks[0].mlp.conv2.conv, "weight", 0.1)


def normalise_weights(model: nn.Module) -> None:
    weight_norm(model.stages[0].blocks[0].mlp.dwconv.conv)
    parametrizations.weight_norm(model.stages[0].blocks[0].mlp.conv2.conv)
    parametrizations.spectral_norm(model.stages[2].blocks[0].attn.sr.conv)


def freeze(model: nn.Module) -> None:
    freeze_batch_norm_2d(model)


def synchronise(model: nn.Module) -> None:
    for stage in model.stages:
        stage.blocks = nn.SyncBatchNorm.convert_sync_batchnorm(stage.blocks)


@pytest.mark.parametrize("change", [prune_a_tenth, normalise_weights, freeze, synchronise])
def test_changed_layers_fold_from_the_weight_that_they_have_now(change):
    model = make("cmt_ti")
    change(model)
    model.eval()
    with torch.no_grad():
        model(images())  # torch copies no model whose pruned weights have a gradient's history
        for name, param in model.named_parameters():
            if name.endswith(("weight_orig", "weight_g")):
                param.mul_(2)  # as an optimizer's step: the weight itself is of the last forward pass
    folded = reparameterize_model(model)
    with torch.no_grad():
        expected = model(images())
        assert (folded(images()) - expected).norm() <= 1e-5 * expected.norm()
    kinds = [type(m) for m in folded.modules() if isinstance(m, nn.Conv2d)]
    assert set(kinds) == {nn.Conv2d}  # no hooks or parametrizations are left
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in folded.stages[0].blocks[0].attn.modules())


def lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft", reason="NOT TESTED: adapters; pip install peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["conv2.conv"]))


def quantize(model: nn.Module) -> nn.Module:
    from torch.ao.nn.quantized import Conv2d

    model.stages[0].blocks[0].mlp.conv2.conv = Conv2d(166, 46, 1)
    return model


def drop_statistics(model: nn.Module) -> nn.Module:
    model.stages[0].blocks[0].mlp.norm = nn.BatchNorm2d(46, track_running_stats=False)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [(lora, "merge adapters"), (quantize, "before quantizing"), (drop_statistics, "without running statistics")],
)
def test_what_cannot_be_folded_is_refused_in_one_sentence(change, message):
    model = change(make("cmt_ti"))
    with pytest.raises(RuntimeError, match=message) as error:
        reparameterize_model(model)
    assert "\n" not in str(error.value)


# ---- folded and plain weights are not exchanged


@pytest.mark.parametrize("change", [freeze, synchronise, lambda model: None], ids=["frozen", "synchronised", "plain"])
@pytest.mark.parametrize("features_only", [False, True])
def test_folded_and_plain_weights_are_told_apart(change, features_only):
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = timm.create_model("cmt_ti", **{**SMALL, "num_classes": 0}, features_only=features_only).eval()
        if features_only:
            model = model if change is not synchronise else nn.SyncBatchNorm.convert_sync_batchnorm(model)
            freeze(model) if change is freeze else None
        else:
            change(model)
        return model.eval()

    plain, folded = build(1), reparameterize_model(build(0))
    for model, other in ((plain, folded), (folded, plain)):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        for strict in (True, False):
            with pytest.raises(RuntimeError, match="reparameterized"):
                model.load_state_dict(other.state_dict(), strict=strict)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    again = reparameterize_model(build(2))
    again.load_state_dict(folded.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), folded.state_dict().values()))


@pytest.mark.parametrize("features_only", [False, True])
def test_folded_and_plain_weights_of_a_part_are_told_apart(features_only):
    """Without the model around it, whose own check comes first; what can be exchanged unseen, as torch names both."""
    plain = timm.create_model("cmt_ti", **{**SMALL, "num_classes": 0}, features_only=features_only).eval()
    folded = reparameterize_model(plain)
    stage = "stages_0" if features_only else "stages.0"
    block = f"{stage}.blocks.0"
    for part in ("stem", "stem.conv2", stage, block, f"{block}.attn", f"{block}.attn.sr", f"{block}.mlp.conv2"):
        a, b = plain.get_submodule(part), folded.get_submodule(part)
        with pytest.raises(RuntimeError, match="of a reparameterized model; load it into"):
            a.load_state_dict(b.state_dict(), strict=False)
        with pytest.raises(RuntimeError, match="of a plain one; load it before you reparameterize"):
            b.load_state_dict(a.state_dict(), strict=False)
        a.load_state_dict(a.state_dict()), b.load_state_dict(b.state_dict())


def test_the_weights_of_a_model_without_norms_are_not_called_reparameterized():
    bare, model = make("cmt_ti", 0), make("cmt_ti", 1)
    for name, module in list(bare.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            bare.set_submodule(name, nn.Identity())
    result = model.load_state_dict(bare.state_dict(), strict=False)
    assert not result.unexpected_keys and all(".norm." in key for key in result.missing_keys)
    bare.load_state_dict(bare.state_dict())


def test_a_partial_state_dict_is_not_called_reparameterized():
    model = make("cmt_ti")
    given = {key: value + 1 for key, value in model.state_dict().items() if ".mlp.conv2.conv." in key}
    result = model.load_state_dict(given, strict=False)
    assert not result.unexpected_keys
    assert all(torch.equal(model.state_dict()[key], value) for key, value in given.items())


@pytest.mark.parametrize(
    "targets", [dict(target_modules=["conv2.conv"]), dict(target_parameters=["rel_pos_bias.weight"])]
)
@pytest.mark.parametrize("saved", [None, ["head"], ["mlp.conv2"]])
def test_an_adapter_by_peft_is_saved_and_loaded(targets, saved, tmp_path):
    peft = pytest.importorskip("peft", reason="NOT TESTED: adapters; pip install peft")
    torch.manual_seed(0)
    base = make("cmt_ti")
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(init_lora_weights=False, modules_to_save=saved, **targets)
    )
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "modules_to_save" in name:
                param.add_(0.1)  # as training does
    assert not any("final_conv" in name for name in trained)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with torch.no_grad():
        expected = model.eval()(images())
        torch.testing.assert_close(loaded.eval()(images()), expected)
        assert not torch.equal(expected, base(images()))


def test_a_folded_model_saved_for_the_hub_says_why_it_does_not_load_plain(tmp_path):
    folded = reparameterize_model(make("cmt_ti"))
    timm.models.save_for_hf(folded, str(tmp_path))
    with pytest.raises(RuntimeError, match="of a reparameterized model; load it into timm.utils.reparameterize_model"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
