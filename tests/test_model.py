"""The models: in the registry, of the paper's size and cost, and with the authors' arithmetic."""

import copy
import json

import numpy as np
import pytest
import timm
import torch
from common import MODELS, PARITY, SIZES, SMALL, WITH_WEIGHTS, authors_weights, parity_input
from reference import cmt, loss_and_input_gradient, relative_error
from timm.layers import set_fused_attn
from torch._subclasses.fake_tensor import FakeTensorMode  # so in torch's documentation
from torch.utils.flop_counter import FlopCounterMode

from timm_cmt import layers

# Written out, since what follows from the package's own tables says nothing about them.
FIVE = dict(cmt_ti=160, cmt_xs=192, cmt_s=224, cmt_b=256, cmt_l=288)
PARAMETERS = dict(cmt_ti=9_492_426, cmt_xs=15_247_208, cmt_s=26_256_160, cmt_b=45_715_076, cmt_l=74_774_152)
GMACS = dict(cmt_ti=0.639, cmt_xs=1.547, cmt_s=4.032, cmt_b=9.317, cmt_l=19.499)


def create(name: str, fused_attn: bool, **kwargs) -> torch.nn.Module:
    set_fused_attn(fused_attn)
    try:
        return timm.create_model(name, **kwargs)
    finally:
        set_fused_attn(True)


def test_the_five_names_are_in_the_registry():
    # First of all: tests that take their models from the registry pass when there are none.
    assert FIVE.keys() <= set(timm.list_models("cmt*"))


def test_the_registry_has_the_models_of_the_table_and_no_others():
    assert sorted(timm.list_models("cmt*")) == sorted(timm.list_models(module="cmt")) == sorted(MODELS)
    assert sorted(timm.list_pretrained("cmt*")) == sorted(f"{name}.in1k" for name in WITH_WEIGHTS)


def test_the_five_have_the_paper_s_image_sizes():
    assert FIVE.items() <= SIZES.items()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_table_s(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "context"), [*((name, torch.no_grad) for name in GMACS), ("cmt_ti", torch.inference_mode)]
)
def test_gmacs_are_the_table_s(name, context):
    model = create(name, fused_attn=False, device="meta").eval()
    size = SIZES[name]
    with context(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(GMACS[name], rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_default_config_is_the_authors_evaluation(name):
    cfg = timm.get_pretrained_cfg(name)
    size = SIZES[name]
    assert cfg.input_size == (3, size, size)
    assert cfg.crop_pct == 0.875 and cfg.interpolation == "bicubic"
    assert cfg.mean == (0.485, 0.456, 0.406) and cfg.std == (0.229, 0.224, 0.225)
    assert cfg.license == "mit"


@pytest.mark.parametrize(("name", "size"), [("cmt_ti", 160), ("cmt_s", 224)])
def test_outputs_are_those_of_the_authors_code(name, size):
    expected = np.load(PARITY / f"expected_{name}_{size}.npz")
    model = timm.create_model(name).eval()
    model.load_state_dict(authors_weights(name))
    with torch.no_grad():
        features, maps = model.forward_intermediates(parity_input(size))
        pooled = model.forward_head(features, pre_logits=True)
        logits = model(parity_input(size))
    bound = 1e-4 * np.abs(expected["logits"]).max()
    assert np.abs(logits.numpy() - expected["logits"]).max() < bound
    assert np.abs(pooled.numpy() - expected["pooled"]).max() < bound
    for stage, x in enumerate(maps[1:], start=1):
        assert list(x.shape) == list(expected[f"stage{stage}_shape"])
        for ours, theirs in (
            (x.mean((2, 3)), expected[f"stage{stage}_mean"]),
            (x[:, :, 0, 0], expected[f"stage{stage}_corner"]),
            (x[:, :, -1, -1], expected[f"stage{stage}_last"]),
        ):
            assert relative_error(ours, torch.from_numpy(theirs)) < 1e-4


@pytest.mark.parametrize(("name", "fused"), [*((name, True) for name in WITH_WEIGHTS), ("cmt_ti", False)])
def test_evaluation_is_the_paper_s_equations(name, fused):
    weights = authors_weights(name, seed=1)
    model = create(name, fused_attn=fused).eval()
    model.load_state_dict(weights)
    images = parity_input(SIZES[name])
    with torch.no_grad():
        expected = cmt(weights, images, training=False)
        assert relative_error(model(images), expected["logits"]) < 1e-4
        for ours, stage in zip(model.forward_intermediates(images, intermediates_only=True)[1:], "abcd"):
            assert relative_error(ours, expected[stage]) < 1e-4


def test_training_loss_and_input_gradient_are_the_paper_s_equations():
    name = "cmt_ti"  # the others differ in numbers, which evaluation shows
    # In float64: with batch statistics of two images, float32 rounding grows through the network.
    weights = {key: value.double() for key, value in authors_weights(name, seed=2).items()}
    model = timm.create_model(name).double().train()
    model.load_state_dict(weights)
    images = parity_input(SIZES[name]).double().requires_grad_()
    loss, gradient = loss_and_input_gradient(model(images), images)
    expected_loss, expected_gradient = loss_and_input_gradient(cmt(weights, images, training=True)["logits"], images)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert relative_error(gradient, expected_gradient) < 1e-6


def test_initialisation_is_the_authors():
    torch.manual_seed(0)
    model = timm.create_model("cmt_ti")
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if name.endswith("rel_pos_bias.weight"):
            expected = 1.0
        elif parameter.ndim == 4:  # Kaiming normal over out_channels * kernel, whatever the groups
            expected = (2 / (parameter.shape[0] * parameter.shape[2] * parameter.shape[3])) ** 0.5
        elif parameter.ndim == 2:
            expected = 0.02
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
            continue
        count = parameter.numel()
        assert parameter.std().item() == pytest.approx(expected, rel=5 / (2 * count) ** 0.5), (name, type(module))
        assert abs(parameter.mean().item()) < 5 * expected / count**0.5, name


def test_weights_decay_for_everything_but_norms_and_biases():
    from timm.optim import param_groups_weight_decay

    model = timm.create_model("cmt_ti")
    no_decay, decay = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for p in decay["params"]}
    assert all(id(stage.rel_pos_bias.weight) in decayed for stage in model.stages)
    assert all(p.ndim == 1 for p in no_decay["params"])


def test_layer_decay_gives_every_block_its_own_rate_and_the_head_the_full_one():
    from timm.optim import param_groups_layer_decay

    model = timm.create_model("cmt_ti")
    groups = param_groups_layer_decay(model, 0.05, layer_decay=0.5)
    by_id = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    scale = {name: by_id[id(p)] for name, p in model.named_parameters()}
    blocks = [scale[f"stages.{i}.blocks.{j}.attn.q.weight"] for i in range(4) for j in range((2, 2, 10, 2)[i])]
    assert blocks == sorted(blocks) and len(set(blocks)) == 16
    assert scale["stem.conv1.weight"] < blocks[0]
    assert scale["final_conv.0.conv.weight"] == blocks[-1] < scale["head.weight"] == 1.0


def test_drop_path_rises_linearly_over_all_blocks():
    model = timm.create_model("cmt_ti", drop_path_rate=0.15)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx(list(np.linspace(0, 0.15, 16)))


def test_dropout_arguments_reach_their_layers():
    model = timm.create_model("cmt_ti", drop_rate=0.1, proj_drop_rate=0.2, attn_drop_rate=0.3)
    block = model.stages[2].blocks[3]
    assert model.head_drop.p == 0.1
    assert [block.attn.proj_drop.p, block.mlp.dwconv.drop.p, block.mlp.drop.p] == [0.2] * 3
    assert block.attn.attn_drop.p == 0.3


def test_act_and_norm_layers_can_be_replaced():
    model = timm.create_model("cmt_ti", act_layer="relu", norm_layer="batchnorm2d").eval()
    block = model.stages[0].blocks[0]
    assert type(block.mlp.dwconv.act).__name__ == type(model.stem.conv2.act).__name__ == "ReLU"
    assert type(block.norm1).__name__ == type(model.stages[0].downsample.norm).__name__ == "BatchNorm2d"
    assert model(torch.zeros(1, 3, 160, 160)).shape == (1, 1000)


@pytest.mark.parametrize(("pool", "width"), [("avg", 1280), ("fast", 1280), ("max", 1280), ("catavgmax", 2560)])
def test_global_pools(pool, width):
    model = timm.create_model("cmt_ti", global_pool=pool, num_classes=7, img_size=64).eval()
    features = model.forward_features(torch.zeros(2, 3, 64, 64))
    assert features.shape == (2, 1280, 2, 2)
    assert model.forward_head(features, pre_logits=True).shape == (2, width)
    model.reset_classifier(3)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 3)
    assert model.forward_head(features, pre_logits=True).shape == (2, width)


def test_a_classifier_comes_back_after_its_pooling_was_taken():
    model = timm.create_model("cmt_ti", img_size=64).eval()
    model.reset_classifier(0, "")
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 1280, 2, 2)
    model.reset_classifier(5)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 5)


def test_features_are_the_stem_and_the_stages():
    model = timm.create_model("cmt_s", features_only=True)
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert model.feature_info.channels() == [32, 64, 128, 256, 512]
    shapes = [tuple(x.shape[2:]) for x in model(torch.zeros(1, 3, 64, 96))]
    assert shapes == [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3)]
    assert len(timm.create_model("cmt_s", features_only=True, out_indices=(2, 4))(torch.zeros(1, 3, 64, 64))) == 2


def test_gradient_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    model = timm.create_model("cmt_ti", img_size=64, num_classes=10).train()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    images = torch.randn(2, 3, 64, 64)
    for m in (model, other):
        m(images).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_channels_last_gives_the_same():
    torch.manual_seed(0)
    model = timm.create_model("cmt_ti", img_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        actual = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_meta_device_then_weights():
    weights = timm.create_model("cmt_ti").state_dict()
    model = timm.create_model("cmt_ti", device="meta")
    model.load_state_dict(weights, assign=True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), weights.values()))


def test_init_weights_after_to_empty_makes_a_whole_model():
    model = timm.create_model("cmt_ti", device="meta").to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(-7)
    model.init_weights()
    assert model.stages[0].rel_pos_bias.query_grid.tolist() == [40, 40]
    assert not any((tensor == -7).any() for tensor in model.state_dict().values())


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 has no fake GPU where there is no real one")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("training", "recompute"), [(False, False), (True, False), (True, True)])
def test_a_model_on_a_gpu_mixes_in_no_tensor_of_the_cpu(training, recompute, dtype, monkeypatch):
    """By fake tensors, which have a device and no values: forward passes alone, since gradients want a real device."""
    monkeypatch.setattr(layers, "_is_eager", lambda _: True)  # the way of tensors that have values
    model = timm.create_model("cmt_ti", **SMALL, recompute_act=recompute, device="meta", dtype=dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(training):
        model.train(training).to_empty(device="cuda")
        for height in (64, 96):  # its own size, and one that the position bias is resized to
            out = model(torch.empty(2, 3, height, 64, device="cuda", dtype=dtype))
            assert out.device.type == "cuda" and out.dtype == dtype and out.shape == (2, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(img_size=31), "at least 32 pixels"),
        (dict(img_size=(224, 16)), "at least 32 pixels"),
        (dict(num_heads=(1, 2, 4, 7)), "7 heads do not divide 368 channels"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("cmt_ti", **arguments)


def test_unknown_arguments_raise():
    with pytest.raises(TypeError, match="not_an_argument"):
        timm.create_model("cmt_ti", not_an_argument=1)


def test_parity_data_is_the_release_s_layout():
    counts = {name: len(json.loads((PARITY / f"layout_{name}.json").read_text())) for name in WITH_WEIGHTS}
    assert counts["cmt_ti"] == 708 and counts["cmt_s"] == 1079
