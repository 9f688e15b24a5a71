"""One model at any image size: run time agrees with a model built at the size, and follows its weights."""

import copy
import io
import json

import numpy as np
import pytest
import timm
import torch
from common import SMALL
from torch import Tensor, nn

from timm_cmt import resize_rel_pos_bias
from timm_cmt.cmt import VARIANTS

ODD_SIZES = [(32, 32), (47, 61), (117, 192), (160, 96), (33, 250)]
BUILT = 64


def make(img_size=BUILT, seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("cmt_ti", **{**SMALL, "img_size": img_size, **kwargs}).eval()


def images(size: tuple[int, int], batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def built_at(size, model: nn.Module) -> nn.Module:
    """A fresh model built at `size`, with the weights of `model`: what `model` has to agree with there."""
    other = timm.create_model("cmt_ti", **{**SMALL, "img_size": size})
    other.load_state_dict(model.state_dict())
    return other.to(model.head.weight.dtype).train(model.training)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make()


# ---- run time


@pytest.mark.parametrize("size", ODD_SIZES)
def test_evaluation_is_that_of_a_model_built_at_the_size(model, size):
    with torch.no_grad():
        torch.testing.assert_close(model(images(size)), built_at(size, model)(images(size)))


@pytest.mark.parametrize("size, checkpointing", [*((size, False) for size in ODD_SIZES), ((96, 160), True)])
def test_training_is_that_of_a_model_built_at_the_size(size, checkpointing):
    model = make().double().train()
    other = built_at(size, model)
    model.set_grad_checkpointing(checkpointing)
    x = images(size).double()
    grids = [stage.rel_pos_bias.query_size for stage in other.stages]
    losses = []
    for m in (model, other):
        losses.append(m(x).square().sum())
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(model.stem.conv1.weight.grad, other.stem.conv1.weight.grad)
    for stage, built, grid in zip(model.stages, other.stages, grids):
        # The gradient of B is that of the resized B, taken back through the interpolation.
        weight = stage.rel_pos_bias.weight.detach().requires_grad_()
        old, key = stage.rel_pos_bias.query_size, stage.rel_pos_bias.key_size
        resized = resize_rel_pos_bias(weight, old, key(old), grid, key(grid))
        resized.backward(built.rel_pos_bias.weight.grad)
        torch.testing.assert_close(stage.rel_pos_bias.weight.grad, weight.grad)


def test_channels_last_and_autocast(model):
    size = (117, 192)
    with torch.no_grad():
        expected = model(images(size))
        other = copy.deepcopy(model).to(memory_format=torch.channels_last)
        x = images(size).to(memory_format=torch.channels_last)
        torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(images(size))
            built = built_at(size, model)(images(size))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low, built, rtol=0.02, atol=0.02 * expected.abs().max().item())


def test_autocast_leaves_the_resizing_in_float32():
    bias = make().stages[0].rel_pos_bias
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = bias(20, 24)
    low.sum().backward()
    assert low.dtype == torch.float32 and torch.equal(low, bias(20, 24))
    gradient, bias.weight.grad = bias.weight.grad, None
    bias(20, 24).sum().backward()
    assert torch.equal(gradient, bias.weight.grad)


def test_several_models_at_once_through_vmap():
    from torch.func import functional_call, stack_module_state

    models, x = [make(seed=seed, depths=(1, 1, 1, 1)) for seed in (0, 1)], images((96, 64))
    params, buffers = stack_module_state(models)
    with torch.no_grad():
        for _ in range(2):
            outputs = torch.vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(params, buffers)
            for actual, model in zip(outputs, models):
                torch.testing.assert_close(actual, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("feature_cls", ["list", "hook", "fx", "getter"])
def test_feature_extractors(model, feature_cls):
    same = dict(img_size=BUILT, depths=SMALL["depths"])
    features = timm.create_model("cmt_ti", features_only=True, feature_cls=feature_cls, **same).eval()
    assert not features.load_state_dict(model.state_dict(), strict=False).missing_keys
    x = images((117, 192))
    with torch.no_grad():
        outputs = features(x)
        for actual, expected in zip(outputs, model.forward_intermediates(x, intermediates_only=True), strict=True):
            torch.testing.assert_close(actual, expected)
    shapes = [tuple(output.shape[2:]) for output in outputs]
    assert shapes == [(59, 96), (29, 48), (14, 24), (7, 12), (3, 6)]


def test_shapes_at_another_size_on_the_meta_device():
    model = timm.create_model("cmt_ti", device="meta")
    assert model(torch.empty(1, 3, 96, 200, device="meta")).shape == (1, 1000)


def test_an_image_under_32_pixels_is_named(model):
    features = timm.create_model("cmt_ti", features_only=True)
    for run in (model, model.forward_features, model.forward_intermediates, features):
        for size in [(31, 64), (64, 8)]:
            with pytest.raises(
                ValueError, match=f"{size[0]} x {size[1]} pixels is too small for CMT; it takes 32 x 32"
            ):
                run(images(size))


# ---- never stale


def double_by_optimizer(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([stage.rel_pos_bias.weight for stage in model.stages], lr=1.0)
    for stage in model.stages:
        stage.rel_pos_bias.weight.grad = -stage.rel_pos_bias.weight.detach()
    optimizer.step()


def double_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for stage in model.stages:
            stage.rel_pos_bias.weight.mul_(2)


def double_through_data(model: nn.Module) -> None:
    for stage in model.stages:
        stage.rel_pos_bias.weight.data.mul_(2)


def double_by_new_parameter(model: nn.Module) -> None:
    for stage in model.stages:
        stage.rel_pos_bias.weight = nn.Parameter(stage.rel_pos_bias.weight.detach() * 2)


def double_by_load_state_dict(model: nn.Module, assign: bool = False) -> None:
    state = {k: v * 2 if k.endswith("rel_pos_bias.weight") else v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)


def double_by_assign(model: nn.Module) -> None:
    double_by_load_state_dict(model, assign=True)


def double_one_number(model: nn.Module) -> None:
    with torch.no_grad():
        model.stages[2].rel_pos_bias.weight[1, 3, 2] *= 2


CHANGES = [double_by_optimizer, double_through_data, double_by_new_parameter, double_by_assign, double_one_number]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: getattr(change, "__name__", "lambda"))
def test_a_resized_bias_is_never_stale(change):
    model, size = make(), (117, 192)
    with torch.no_grad():
        before = model(images(size))
    change(model)
    dtype = model.head.weight.dtype
    with torch.no_grad():
        after = model(images(size).to(dtype))
        torch.testing.assert_close(after, built_at(size, model).to(dtype)(images(size).to(dtype)))
    assert not torch.equal(after.float(), before.float())


def test_an_averaged_copy_follows_its_weights():
    from timm.utils import ModelEmaV3

    model, size = make(), (96, 64)
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        ema.module(images(size))
        double_in_place(model)
        ema.update(model)
        torch.testing.assert_close(ema.module(images(size)), built_at(size, ema.module)(images(size)))


@pytest.mark.parametrize("name", ["ModelEma", "ModelEmaV2", "ModelEmaV3"])
def test_averaging_leaves_the_grid_as_it_is(name):
    model = make((96, 160))
    ema = getattr(timm.utils, name)(model, decay=0.9)  # 0.1 * 24 + 0.9 * 24 is below 24
    for _ in range(20):
        ema.update(model)
    state = ema.ema.state_dict() if name == "ModelEma" else ema.module.state_dict()
    assert [state[f"stages.{i}.rel_pos_bias.query_grid"].tolist() for i in range(4)] == [
        [24, 40],
        [12, 20],
        [6, 10],
        [3, 5],
    ]
    make((64, 96)).load_state_dict(state)


# ---- set_input_size


@pytest.mark.parametrize("size", [(96, 160), 128, (33, 47)])
def test_set_input_size_is_what_loading_at_the_size_gives(size):
    model = make()
    expected = built_at(size, model).state_dict()
    model.set_input_size(size)
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize("size", [(96, 160), (63, 95), np.int64(96)])
def test_the_configuration_has_the_size_of_the_last_map_and_can_be_written(size):
    model = make()
    model.set_input_size(size)
    cfg, x = model.pretrained_cfg, torch.zeros(1, *model.pretrained_cfg["input_size"])
    assert cfg["input_size"] == (3, *timm.layers.to_2tuple(size))
    with torch.no_grad():
        assert cfg["pool_size"] == model.forward_features(x).shape[2:]
    assert cfg["pool_size"] == make(cfg["input_size"][1:]).pretrained_cfg["pool_size"]
    json.dumps(cfg)


def test_set_input_size_updates_timm_s_record():
    model = make()
    model.set_input_size((96, 160))
    assert model.default_cfg is model.pretrained_cfg
    assert timm.data.resolve_data_config(model=model)["input_size"] == (3, 96, 160)
    assert timm.get_pretrained_cfg("cmt_ti").input_size == (3, 160, 160)
    if hasattr(timm.models, "get_model_input_config"):
        config = timm.models.get_model_input_config(model)
        assert config["input_size"] == (3, 96, 160) and not config["fixed_input_size"]
        assert timm.models.get_model_args(model)["img_size"] == (96, 160)


def test_set_input_size_keeps_what_is_frozen_and_the_dtype():
    model = make().bfloat16()
    model.stages[1].rel_pos_bias.weight.requires_grad_(False)
    model.set_input_size((96, 160))
    assert [stage.rel_pos_bias.weight.requires_grad for stage in model.stages] == [True, False, True, True]
    assert all(stage.rel_pos_bias.weight.dtype == torch.bfloat16 for stage in model.stages)


def test_set_input_size_of_its_own_size_replaces_nothing():
    model = make()
    before = list(model.parameters())
    model.set_input_size(BUILT)
    assert all(a is b for a, b in zip(before, model.parameters()))


def test_set_input_size_of_a_model_made_without_timm_s_factory():
    from timm_cmt import CMT

    model = CMT(img_size=64, embed_dims=(16, 32, 64, 128), depths=(1, 1, 1, 1))
    model.set_input_size((96, 64))
    assert model.stages[0].rel_pos_bias.query_size == (24, 16)


def test_set_input_size_refuses_a_bias_that_is_no_parameter():
    from torch.nn.utils import prune

    model = make()
    prune.l1_unstructured(model.stages[0].rel_pos_bias, "weight", 0.2)
    with pytest.raises(RuntimeError, match="pruned or parametrized position bias cannot be resized; make that perm"):
        model.set_input_size(96)
    prune.remove(model.stages[0].rel_pos_bias, "weight")
    model.set_input_size(96)
    assert model(images((96, 96))).isfinite().all()


def test_a_device_that_is_named_goes_before_torch_s_default():
    with torch.device("meta"):
        model = make(device="cpu")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}


def test_set_input_size_refuses_what_is_too_small():
    with pytest.raises(ValueError, match="at least 32 pixels"):
        make().set_input_size((96, 31))


# ---- round trips


def assert_same_tensors(a: nn.Module, b: nn.Module) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


WHOLE = dict(depths=VARIANTS["cmt_ti"]["depths"])  # what timm saves does not say how deep a model is


def built(size, folder):
    return make(size, **WHOLE)


def resized(size, folder):
    model = make(**WHOLE)
    model.set_input_size(size)
    return model


def fine_tuned(size, folder):
    torch.save(timm.create_model("cmt_ti").state_dict(), folder / "pretrained.pth")
    overlay = dict(file=str(folder / "pretrained.pth"))
    model = timm.create_model(
        "cmt_ti", pretrained=True, pretrained_cfg_overlay=overlay, img_size=size, num_classes=10, in_chans=1
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images(size, channels=1)).sum().backward()
    optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    "how, size, safe",
    [
        *((how, size, True) for how in (built, resized, fine_tuned) for size in [(64, 64), (80, 80), (117, 70)]),
        (built, (117, 70), False),
    ],
)
def test_what_timm_saves_for_the_hub_comes_back_bit_for_bit(how, size, safe, tmp_path):
    model = how(size, tmp_path)
    timm.models.save_for_hf(model, str(tmp_path / "saved"), safe_serialization=safe)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert_same_tensors(loaded, model)
    assert timm.data.resolve_data_config(model=loaded)["input_size"][1:] == size
    x = images(size, channels=model.in_chans)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("channels", [2, 4])
def test_a_saved_model_of_other_channels_comes_back_bit_for_bit(channels, tmp_path):
    model = make(in_chans=channels, **WHOLE)
    timm.models.save_for_hf(model, str(tmp_path))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert_same_tensors(loaded, model)
    assert loaded.pretrained_cfg["first_conv"] == "stem.conv1"


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_a_training_checkpoint_comes_back_bit_for_bit(size, tmp_path):
    from timm.utils import CheckpointSaver

    model = make(size)
    saver = CheckpointSaver(
        model, torch.optim.SGD(model.parameters()), checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(0, metric=1.0)
    path = str(tmp_path / "last.pth.tar")
    assert_same_tensors(make(size, checkpoint_path=path), model)


# ---- export


def test_a_trace_at_another_size_passes_its_check():
    model, x = make(depths=(1, 1, 1, 1)), images((96, 160))
    traced = torch.jit.trace(model, x, check_trace=True, check_tolerance=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x))


def test_torchscript_has_no_interpolation_at_its_own_size_and_resizes_at_others(model):
    scripted = torch.jit.script(model)
    traced = torch.jit.trace(model, images((BUILT, BUILT)))
    assert "arange" not in str(traced.inlined_graph)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    reloaded = torch.jit.load(buffer)
    with torch.no_grad():
        for size in [(BUILT, BUILT), (96, 160)]:
            torch.testing.assert_close(reloaded(images(size)), model(images(size)))
        torch.testing.assert_close(traced(images((BUILT, BUILT), batch=3)), model(images((BUILT, BUILT), batch=3)))
