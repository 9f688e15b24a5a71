"""The paper's ablations and its scaling rule: of the paper's size and cost, each with what it says it has."""

import math
import sys

import pytest
import timm
import torch
from common import SMALL, images
from reference import relative_error
from test_model import create
from timm.utils import reparameterize_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_cmt.cmt import VARIANTS, default_cfgs
from timm_cmt.layers import ActNormConv

# Parameters in M and GMACs at 224 x 224, written out, and as the paper prints them in Tables 3 and 4.
SIZES = dict(
    cmt_s_4stage=(24.383, 3.661, 25, 3.7),
    cmt_s_4stage_stem=(24.408, 3.919, 25, 3.9),
    cmt_s_4stage_lpu=(24.470, 3.935, 25, 3.9),
    cmt_s_4stage_lpu_noskip=(24.470, 3.935, 25, 3.9),
    cmt_s_4stage_irffn=(24.830, 3.999, 25, 3.9),
    cmt_s_4stage_irffn_noskip=(24.830, 3.999, 25, 3.9),
    cmt_s_layernorm=(26.256, 4.032, 25, 4.0),
    cmt_s_batchnorm=(26.256, 4.032, 25, 4.0),
)
PUBLISHED = dict(cmt_ti=-2, cmt_xs=-1, cmt_s=0, cmt_b=1)  # and their phi
TINY = dict(SMALL, depths=(1, 1, 1, 1))


@pytest.fixture(scope="module", autouse=True)
def ablation():
    """The module; after these tests its models are gone from the registry, which other tests count."""
    registry = sys.modules["timm.models._registry"]
    before = {name: value.copy() for name, value in vars(registry).items() if isinstance(value, (dict, set))}
    import timm_cmt.ablation

    yield timm_cmt.ablation
    for name, value in before.items():
        if not name.startswith("__"):
            getattr(registry, name).clear()
            getattr(registry, name).update(value)
    sys.modules.pop("timm_cmt.ablation")


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_multiply_adds_are_the_paper_s(name):
    parameters, gmacs, paper_parameters, paper_gmacs = SIZES[name]
    model = create(name, fused_attn=False, device="meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224, device="meta"))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=1e-3)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, abs=1e-3)
    # The paper prints CMT-S itself as 25 M, where its code and two more of its tables have 26.26 M.
    assert abs(parameters - paper_parameters) < 1.3 and abs(gmacs - paper_gmacs) < 0.1


def test_each_step_of_the_ladder_changes_what_it_says():
    def parts(name: str) -> list[str]:
        model = timm.create_model(name, **TINY, device="meta")
        block = model.stages[2].blocks[0]
        return [type(part).__name__ for part in (model.stem, block.lpu, block.attn, block.mlp, model.final_conv)]

    attn = "LightweightAttention"
    assert parts("cmt_s_4stage") == ["PatchStem", "Identity", attn, "FeedForward", "LayerNorm2d"]
    assert parts("cmt_s_4stage_stem") == ["Stem", "Identity", attn, "FeedForward", "LayerNorm2d"]
    assert parts("cmt_s_4stage_lpu") == ["Stem", "LocalPerceptionUnit", attn, "FeedForward", "LayerNorm2d"]
    assert parts("cmt_s_4stage_irffn") == [
        "Stem", "LocalPerceptionUnit", attn, "InvertedResidualFFN", "LayerNorm2d"
    ]  # fmt: skip
    assert parts("cmt_s") == ["Stem", "LocalPerceptionUnit", attn, "InvertedResidualFFN", "FinalConv"]


@pytest.mark.parametrize(("name", "gone", "there"), [
    ("cmt_s_layernorm", nn.BatchNorm2d, nn.LayerNorm),
    ("cmt_s_batchnorm", nn.LayerNorm, nn.BatchNorm2d),
])  # fmt: skip
def test_a_model_of_one_norm_has_no_other(name, gone, there):
    model, plain = (timm.create_model(n, **TINY, device="meta") for n in (name, "cmt_s"))
    assert not any(isinstance(module, gone) for module in model.modules())
    norms = [sum(isinstance(m, (nn.LayerNorm, nn.BatchNorm2d)) for m in net.modules()) for net in (model, plain)]
    assert norms[0] == norms[1] == sum(isinstance(module, there) for module in model.modules())


def test_without_their_shortcuts_lpu_and_irffn_are_their_convolutions_alone():
    torch.manual_seed(0)
    names = ("cmt_s_4stage_lpu", "cmt_s_4stage_lpu_noskip", "cmt_s_4stage_irffn", "cmt_s_4stage_irffn_noskip")
    lpu, plain_lpu, irffn, plain_irffn = (timm.create_model(name, **TINY).eval().stages[0].blocks[0] for name in names)
    x = images(2, 64, 8, 8)
    with torch.no_grad():
        plain_lpu.lpu.dwconv.load_state_dict(lpu.lpu.conv.state_dict())
        assert torch.equal(plain_lpu.lpu(x) + x, lpu.lpu(x))

        mlp, plain = irffn.mlp, plain_irffn.mlp
        for source, target in ((mlp.conv1, plain.expand), (mlp.dwconv, plain.local), (mlp.conv2, plain.project)):
            target.load_state_dict(source.state_dict())
        mlp.dwconv.conv.weight[:, 0, 1, 1] -= 1  # takes the shortcut away
        torch.testing.assert_close(plain(x), mlp(x), rtol=1e-4, atol=1e-4)
        assert sum(isinstance(module, ActNormConv) for module in plain.modules()) == 2


@pytest.mark.parametrize("name", SIZES)
def test_they_take_any_size_and_give_the_features_of_their_strides(name):
    model = timm.create_model(name, **TINY).eval()
    with torch.no_grad():
        assert model(images(1, height=67, width=47)).shape == (1, 10)
        out, maps = model.forward_intermediates(images(1))
    assert out.shape == (1, model.num_features, 2, 2)
    reductions = [4, 4, 8, 16, 32] if name == "cmt_s_4stage" else [2, 4, 8, 16, 32]
    assert [info["reduction"] for info in model.feature_info] == reductions
    assert [tuple(x.shape[1:]) for x in maps] == [
        (info["num_chs"], 64 // info["reduction"], 64 // info["reduction"]) for info in model.feature_info
    ]


def test_the_patch_stem_gives_the_grid_of_cmt_s_stem_and_first_aggregation():
    plain, cmt = (timm.create_model(name, **TINY).eval() for name in ("cmt_s_4stage", "cmt_s"))
    for side in range(32, 40):
        x = images(1, height=side, width=39)
        assert plain.stages[0](plain.stem(x)).shape == cmt.stages[0](cmt.stem(x)).shape


@pytest.mark.parametrize("name", SIZES)
def test_a_checkpoint_loads_at_another_size(name):
    torch.manual_seed(0)
    source = timm.create_model(name, **TINY).eval()
    target = timm.create_model(name, **dict(TINY, img_size=(64, 96))).eval()
    target.load_state_dict(source.state_dict())
    with torch.no_grad():
        x = images(2, height=64, width=96)
        assert relative_error(target(x), source(x)) < 1e-4
    target.set_input_size(64)
    assert [param.shape for param in target.parameters()] == [param.shape for param in source.parameters()]


def test_a_checkpoint_of_one_kind_is_refused_by_the_others_and_named_where_it_has_layers_that_they_lack():
    kwargs = dict(img_size=32, num_classes=0, device="meta")
    models = {name: timm.create_model(name, **kwargs) for name in [*SIZES, "cmt_s"]}
    states = {name: model.state_dict() for name, model in models.items()}
    steps = list(models)
    for name, other in [*zip(steps, steps[1:]), *zip(steps[1:], steps), *((name, "cmt_s") for name in SIZES)]:
        message = f"this checkpoint is {other} .* the model is {name} .*as '{other}'"
        if "cmt_s_4stage" not in (name, other) and states[other].keys() < states[name].keys():
            message = "Missing key"
        with pytest.raises(RuntimeError, match=message):
            models[name].load_state_dict(states[other])


def test_weights_without_the_statistics_of_the_model_s_norms_are_refused():
    state_dict = timm.create_model("cmt_s_layernorm", **TINY).state_dict()
    overlay = dict(state_dict=state_dict, num_classes=10)
    with pytest.raises(RuntimeError, match="lacks stem.conv2.norm.running_mean and"):
        timm.create_model("cmt_s", pretrained=True, pretrained_cfg_overlay=overlay, **{**TINY, "num_classes": 5})


def test_a_feature_extractor_loads_what_its_model_saved():
    for name in ("cmt_s_4stage", "cmt_s_4stage_irffn_noskip", "cmt_s"):
        model = timm.create_model(name, **TINY)
        backbone = timm.create_model(name, features_only=True, **TINY)
        own = dict(backbone.named_parameters())
        state = {k: v for k, v in model.state_dict().items() if not k.startswith(("final_conv", "head"))}
        backbone.load_state_dict(state)
        assert torch.equal(own["stages_3.blocks.0.attn.q.weight"], state["stages.3.blocks.0.attn.q.weight"])


@pytest.mark.parametrize("name", [name for name in SIZES if name != "cmt_s_layernorm"])
def test_reparameterization_keeps_the_outputs(name):
    torch.manual_seed(0)
    model = timm.create_model(name, **TINY)
    with torch.no_grad():
        model(images(8))  # moves the running statistics of BatchNorm from 0 and 1
        model.eval()
        folded = reparameterize_model(model)
        assert len(list(folded.modules())) < len(list(model.modules())) or name.startswith("cmt_s_4stage_lpu")
        assert relative_error(folded(images()), model(images())) < 1e-4


def test_a_model_without_batchnorm_says_that_it_cannot_be_reparameterized():
    model = timm.create_model("cmt_s_layernorm", **TINY).eval()
    with pytest.raises(RuntimeError, match="a LayerNorm2d .* cannot be reparameterized; use the model as it is"):
        reparameterize_model(model)


@pytest.mark.parametrize("name", SIZES)
def test_recomputation_keeps_outputs_and_gradients(name):
    def train(**kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        model = timm.create_model(name, **TINY, **kwargs)
        out = model(images())
        out.square().mean().backward()
        return out.detach(), model.stem.conv1.weight.grad

    for expected, actual in zip(train(), train(recompute_act=True)):
        assert relative_error(actual, expected) < 1e-4


def test_other_widths_give_the_first_and_last_layers_theirs():
    model = timm.create_model("cmt_s_4stage", **dict(TINY, embed_dims=(16, 32, 64, 128))).eval()
    assert model.num_features == 128 and model(images()).shape == (4, 10)


# ---- scaling


def test_phi_0_is_cmt_s(ablation):
    scaled = ablation.scale_cmt(0)
    assert scaled.pop("img_size") == 224
    assert scaled.items() <= VARIANTS["cmt_s"].items()


@pytest.mark.parametrize(
    ("args", "gmacs", "paper"),  # ours written out; the paper's of Table 5
    [
        ((1,), 10.98, 9.3),
        ((-1,), 1.63, 1.5),
        ((1, 2.2, 1, 1), 8.57, 8.6),
        ((-1, 2.2, 1, 1), 1.83, 1.7),
        ((1, 1, 1.6, 1), 9.96, 10),
        ((-1, 1, 1.6, 1), 1.65, 1.7),
    ],
)
def test_multiply_adds_of_scaled_models(ablation, args, gmacs, paper):
    scaled = ablation.scale_cmt(*args)
    model = create("cmt_s", fused_attn=False, device="meta", **scaled).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, scaled["img_size"], scaled["img_size"], device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, abs=0.01)
    assert gmacs == pytest.approx(paper, rel=0.2)


def test_the_rule_gives_the_published_sizes_and_neither_their_blocks_nor_their_widths(ablation):
    rule = {name: ablation.scale_cmt(phi) for name, phi in dict(PUBLISHED, cmt_l=2).items()}
    assert {n: args["img_size"] for n, args in rule.items()} == {
        name: default_cfgs[name].default.input_size[-1] for name in rule
    }
    assert [args["embed_dims"][0] for args in rule.values()] == [38, 50, 64, 84, 108]
    assert [VARIANTS[name]["embed_dims"][0] for name in rule] == [46, 52, 64, 76, 88]
    assert [args["depths"][2] for args in rule.values()] == [11, 13, 16, 19, 23]
    assert [VARIANTS[name]["depths"][2] for name in rule] == [10, 12, 16, 20, 25]


def test_the_published_blocks_are_those_of_1_25_rounded_up_where_there_are_3_and_down_where_there_are_16():
    for name, phi in dict(PUBLISHED, cmt_l=2).items():
        few, many = math.ceil(3 * 1.25**phi), math.floor(16 * 1.25**phi)
        assert VARIANTS[name]["depths"] == (few, few, many, few)


def test_no_base_and_no_rounding_give_the_published_widths():
    ti, xs, s = (VARIANTS[name]["embed_dims"][0] for name in ("cmt_ti", "cmt_xs", "cmt_s"))
    # What is rounded to w lies between w + low and w + high. Widths are multiples of the step, so it is 1 or 2.
    assert math.gcd(ti, xs, s, VARIANTS["cmt_b"]["embed_dims"][0]) == 2
    for step in (1, 2):
        for low, high in ((0, step), (-step, 0), (-step / 2, step / 2)):  # down, up, to the nearest
            assert (xs + high) / (ti + low) < (s + low) / (xs + high)  # of one base, both ratios would be its


@pytest.mark.parametrize("phi", [-20, float("-inf")])
def test_a_phi_that_leaves_no_image_is_refused(ablation, phi):
    with pytest.raises(ValueError, match="give one nearer to 0"):
        ablation.scale_cmt(phi)
