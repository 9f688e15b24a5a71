"""Checkpoints: the authors' layout through every way timm loads, and one clear error for what does not fit."""

import argparse
import http.server
import pickle
import re
import threading
from pathlib import Path

import pytest
import timm
import torch
from common import RELEASE_FILES, WITH_WEIGHTS, authors_weights, parity_input
from reference import cmt
from safetensors.torch import save_file
from timm.models import load_checkpoint, resume_checkpoint
from torch import nn

from timm_cmt.rel_pos_bias import RelPosBias, resize_rel_pos_bias

TI = "cmt_ti"


@pytest.fixture(scope="module")
def expected_logits() -> torch.Tensor:
    with torch.no_grad():
        return cmt(authors_weights(TI), parity_input(160), training=False)["logits"]


@pytest.fixture(scope="module")
def authors_file(tmp_path_factory) -> Path:
    """A training checkpoint as the authors' train.py writes it, its command line in it."""
    path = tmp_path_factory.mktemp("authors") / "cmt_tiny.pth"
    torch.save(dict(model=authors_weights(TI), model_ema=None, epoch=299, args=argparse.Namespace(lr=8e-4)), path)
    return path


def assert_is(model: nn.Module, logits: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(parity_input(160)), logits, rtol=1e-4, atol=1e-4)


def refused(model: nn.Module, state_dict: dict, **kwargs) -> str:
    """The error with which `model` refuses a state dict, leaving every tensor as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state_dict, **kwargs)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


# ---- the ways in


def test_pretrained_takes_the_release_from_torch_s_cache(torch_home, authors_file, expected_logits):
    (torch_home / RELEASE_FILES[TI]).write_bytes(authors_file.read_bytes())
    assert_is(timm.create_model(TI, pretrained=True), expected_logits)


def test_pretrained_cfg_overlay_file(authors_file, expected_logits):
    model = timm.create_model(TI, pretrained=True, pretrained_cfg_overlay=dict(file=str(authors_file)))
    assert_is(model, expected_logits)


def test_pretrained_cfg_overlay_state_dict(expected_logits):
    overlay = dict(state_dict=authors_weights(TI))
    assert_is(timm.create_model(TI, pretrained=True, pretrained_cfg_overlay=overlay), expected_logits)


def test_checkpoint_path_of_create_model(authors_file, expected_logits):
    assert_is(timm.create_model(TI, checkpoint_path=str(authors_file)), expected_logits)


def test_load_checkpoint_of_validate(authors_file, expected_logits):
    model = timm.create_model(TI)
    load_checkpoint(model, str(authors_file))
    assert_is(model, expected_logits)


def test_plain_load_state_dict(authors_file, expected_logits):
    model = timm.create_model(TI)
    with torch.serialization.safe_globals([argparse.Namespace]):
        model.load_state_dict(torch.load(authors_file)["model"])
    assert_is(model, expected_logits)


def test_inside_another_module(expected_logits):
    outer = nn.Sequential(nn.Identity(), timm.create_model(TI))
    outer.load_state_dict({f"1.{key}": value for key, value in authors_weights(TI).items()})
    assert_is(outer, expected_logits)


def test_resume_of_a_timm_checkpoint_at_another_size(tmp_path):
    model = timm.create_model(TI, img_size=64)
    torch.save(dict(state_dict=model.state_dict(), epoch=3, version=2), tmp_path / "last.pth.tar")
    resumed = timm.create_model(TI, img_size=96)
    assert resume_checkpoint(resumed, str(tmp_path / "last.pth.tar")) == 4
    assert torch.equal(resumed.head.weight, model.head.weight)


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_every_tensor_of_the_release_arrives(name):
    weights = authors_weights(name, seed=3)
    state = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights)).state_dict()
    grids = [value for key, value in state.items() if key.endswith("query_grid")]
    assert len(grids) == 4
    assert sum(v.numel() for v in state.values()) - 8 == sum(v.numel() for v in weights.values())
    assert sum(v.double().sum() for v in state.values()) - sum(g.sum() for g in grids) == pytest.approx(
        sum(v.double().sum() for v in weights.values())
    )


def test_the_averaged_weights_are_taken_where_there_are_any(tmp_path, expected_logits):
    averaged = {f"module.{key}": value for key, value in authors_weights(TI).items()}
    overlay = dict(state_dict=dict(model=authors_weights(TI, seed=5), model_ema=averaged))
    assert_is(timm.create_model(TI, pretrained=True, pretrained_cfg_overlay=overlay), expected_logits)
    torch.save(overlay["state_dict"], tmp_path / "ema.pth")
    overlay = dict(file=str(tmp_path / "ema.pth"))
    assert_is(timm.create_model(TI, pretrained=True, pretrained_cfg_overlay=overlay), expected_logits)


# ---- adapting


def test_other_classes_keep_everything_but_the_classifier():
    weights = authors_weights(TI)
    model = timm.create_model(TI, pretrained=True, num_classes=5, pretrained_cfg_overlay=dict(state_dict=weights))
    assert model.head.weight.shape == (5, 1280)
    assert torch.equal(model.final_conv[0].conv.weight, weights["_fc.weight"])
    model = timm.create_model(TI, pretrained=True, num_classes=0, pretrained_cfg_overlay=dict(state_dict=weights))
    assert torch.equal(model.final_conv[0].conv.weight, weights["_fc.weight"])


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_input_channels_adapt_the_first_convolution(in_chans):
    weights = authors_weights(TI)
    model = timm.create_model(TI, pretrained=True, in_chans=in_chans, pretrained_cfg_overlay=dict(state_dict=weights))
    if in_chans == 1:
        torch.testing.assert_close(model.stem.conv1.weight, weights["stem_conv1.weight"].sum(1, keepdim=True))
    else:
        torch.testing.assert_close(model.stem.conv1.weight[:, :3], weights["stem_conv1.weight"] * 3 / 4)
    assert torch.equal(model.head.weight, weights["head.weight"])


def test_features_only_has_the_weights():
    weights = authors_weights(TI)
    model = timm.create_model(
        TI, pretrained=True, features_only=True, pretrained_cfg_overlay=dict(state_dict=weights)
    ).eval()
    with torch.no_grad():
        expected = cmt(weights, parity_input(160), training=False)
        for ours, stage in zip(model(parity_input(160))[1:], "abcd"):
            torch.testing.assert_close(ours, expected[stage], rtol=1e-3, atol=1e-3)


def test_another_size_resizes_the_bias_and_nothing_else(caplog):
    weights = authors_weights(TI)
    with caplog.at_level("INFO", logger="timm_cmt"):
        model = timm.create_model(
            TI, pretrained=True, img_size=(96, 224), pretrained_cfg_overlay=dict(state_dict=weights)
        )
    state = model.state_dict()
    for stage, (letter, k) in enumerate(zip("abcd", (8, 4, 2, 1))):
        old, new = (160 // 2 ** (stage + 2),) * 2, (96 // 2 ** (stage + 2), 224 // 2 ** (stage + 2))
        expected = resize_rel_pos_bias(
            weights[f"relative_pos_{letter}"], old, (old[0] // k, old[1] // k), new, (new[0] // k, new[1] // k)
        )
        assert torch.equal(state[f"stages.{stage}.rel_pos_bias.weight"], expected)
        assert state[f"stages.{stage}.rel_pos_bias.query_grid"].tolist() == list(new)
    assert torch.equal(state["head.weight"], weights["head.weight"])
    assert [r.message for r in caplog.records] == [
        "Resized the relative position bias from 160 x 160 to 96 x 224 pixels"
    ]


def test_a_size_in_features_only_is_resized(caplog):
    small = timm.create_model(TI, features_only=True, img_size=64)
    large = timm.create_model(TI, features_only=True, img_size=(64, 96))
    with caplog.at_level("INFO", logger="timm_cmt"):
        large.load_state_dict(small.state_dict())
    assert large.stages_0.rel_pos_bias.weight.shape == (1, 16 * 24, 2 * 3)
    assert [r.message for r in caplog.records] == ["Resized the relative position bias from 64 x 64 to 64 x 96 pixels"]


def test_a_size_in_a_stage_by_itself_is_resized_by_the_bias(caplog):
    small, large = (timm.create_model(TI, img_size=size).stages[0] for size in (64, (64, 96)))
    with caplog.at_level("INFO", logger="timm_cmt"):
        large.load_state_dict(small.state_dict())
    assert large.rel_pos_bias.weight.shape == (1, 16 * 24, 2 * 3)
    assert "(16, 16)" in caplog.text and "(16, 24)" in caplog.text


def test_transposed_sizes_are_told_apart():
    wide, tall = timm.create_model(TI, img_size=(96, 160)), timm.create_model(TI, img_size=(160, 96))
    tall.load_state_dict(wide.state_dict())
    B = wide.stages[0].rel_pos_bias.weight
    assert not torch.equal(tall.stages[0].rel_pos_bias.weight, B)
    expected = resize_rel_pos_bias(B, (24, 40), (3, 5), (40, 24), (5, 3))
    assert torch.equal(tall.stages[0].rel_pos_bias.weight, expected)


# ---- what does not fit


@pytest.mark.parametrize(
    ("given", "wanted", "layout"),
    [
        ("cmt_s", "cmt_xs", "authors'"),
        ("cmt_b", "cmt_ti", "authors'"),
        ("cmt_ti", "cmt_s", "authors'"),
        ("cmt_ti", "cmt_s", "ours"),
    ],
)
def test_another_variant_is_named(given, wanted, layout):
    weights = authors_weights(given) if layout == "authors'" else timm.create_model(given).state_dict()
    message = refused(timm.create_model(wanted), weights)
    assert f"is {given} (" in message and f"the model is {wanted} (" in message
    with pytest.raises(RuntimeError, match=re.escape(f"is {given} (")):
        timm.create_model(wanted, pretrained=True, num_classes=3, pretrained_cfg_overlay=dict(state_dict=weights))


def test_another_network_is_refused():
    weights = timm.create_model("resnet18").state_dict()
    assert "not of a CMT: none of its 122 entries (conv1.weight" in refused(timm.create_model(TI), weights)
    for options in (dict(), dict(in_chans=1, num_classes=7)):
        with pytest.raises(RuntimeError, match="not of a CMT"):
            timm.create_model(TI, pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights), **options)


def test_wrong_shapes_are_named():
    weights = authors_weights(TI)
    weights["blocks_c.3.attn.q.weight"] = torch.zeros(184, 92)
    message = refused(timm.create_model(TI), weights)
    assert "stages.2.blocks.3.attn.q.weight is (184, 92) there, (184, 184) here" in message


def test_other_classes_in_a_plain_load_name_the_remedy():
    assert "num_classes=..." in refused(timm.create_model(TI, num_classes=10), authors_weights(TI))
    assert "num_classes=..." in refused(timm.create_model(TI, num_classes=10), authors_weights(TI), strict=False)
    assert "in_chans=..." in refused(timm.create_model(TI, in_chans=1), authors_weights(TI))


def test_missing_and_unexpected_entries_are_named_and_strict_false_takes_the_rest():
    weights = authors_weights(TI)
    del weights["_fc.weight"], weights["blocks_a.0.attn.v.weight"]
    with pytest.raises(RuntimeError) as error:  # torch's own words, which come after the rest is loaded
        timm.create_model(TI).load_state_dict(weights)
    message = str(error.value)
    assert "final_conv.0.conv.weight" in message
    weights = authors_weights(TI) | {"aux.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="aux.weight"):
        timm.create_model(TI).load_state_dict(weights)
    model = timm.create_model(TI)
    result = model.load_state_dict(weights, strict=False)
    assert result.unexpected_keys == ["aux.weight"] and not result.missing_keys
    assert torch.equal(model.head.weight, weights["head.weight"])


@pytest.mark.parametrize("options", [dict(num_classes=10), dict(features_only=True)])
def test_an_incomplete_checkpoint_is_refused_with_other_classes_too(options):
    weights = {key: value for key, value in authors_weights(TI).items() if not key.startswith("blocks_c.3.mlp.conv1.")}
    with pytest.raises(
        RuntimeError, match=r"is not whole: it lacks stages.2.blocks.3.mlp.conv1.weight and \d more; load"
    ):
        timm.create_model(TI, pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights), **options)


def test_a_file_that_holds_no_state_dict_is_named(tmp_path):
    torch.save([1, 2, 3], tmp_path / "list.pth")
    with pytest.raises(RuntimeError, match="list.pth holds no state dict but a list"):
        timm.create_model(TI, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "list.pth")))


def test_a_grid_without_its_bias_is_ignored():
    model = timm.create_model(TI, img_size=64)
    own = model.state_dict()
    others = timm.create_model(TI).state_dict()
    model.load_state_dict({k: v for k, v in others.items() if v.shape == own[k].shape}, strict=False)
    assert model.stages[0].rel_pos_bias.query_grid.tolist() == [16, 16]


def test_a_training_checkpoint_names_its_entry():
    assert "pass its 'model' entry" in refused(timm.create_model(TI), dict(model=authors_weights(TI), epoch=1))


@pytest.mark.parametrize("layout", ["ours", "authors'"])
def test_a_wrapper_s_prefix_is_named(layout):
    model = timm.create_model(TI)
    weights = model.state_dict() if layout == "ours" else authors_weights(TI)
    assert "begin with 'module.'" in refused(model, {f"module.{key}": value for key, value in weights.items()})


def test_the_authors_weights_load_from_a_model_that_held_theirs_as_its_model():
    model = timm.create_model(TI)
    model.load_state_dict({f"model.{key}": value for key, value in authors_weights(TI).items()})
    assert torch.equal(model.stem.conv1.weight, authors_weights(TI)["stem_conv1.weight"])


def test_statistics_alone_load_without_strict():
    model = timm.create_model(TI)
    state = {key: value + 1 for key, value in model.state_dict().items() if key.endswith("running_mean")}
    model.load_state_dict(state, strict=False)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


def test_a_grid_that_cannot_be_told_names_the_key_to_add():
    model = timm.create_model(TI, img_size=(96, 160))
    weights = {key: value for key, value in model.state_dict().items() if not key.endswith("query_grid")}
    message = refused(timm.create_model(TI), weights)
    assert "960 queries and 15 keys, which is no square" in message
    assert "stages.0.rel_pos_bias.query_grid = torch.tensor([height, width])" in message
    for i, grid in enumerate([(24, 40), (12, 20), (6, 10), (3, 5)]):
        weights[f"stages.{i}.rel_pos_bias.query_grid"] = torch.tensor(grid)
    other = timm.create_model(TI, img_size=(96, 160))
    other.load_state_dict(weights)
    assert torch.equal(other.stages[3].rel_pos_bias.weight, model.stages[3].rel_pos_bias.weight)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_bias_that_contradicts_its_grid_is_refused(stage):
    weights = timm.create_model(TI).state_dict()
    weights[f"stages.{stage}.rel_pos_bias.query_grid"] = torch.tensor([7, 9])
    assert "query grid of 7 x 9 tokens" in refused(timm.create_model(TI, img_size=96), weights)


def test_cmt_l_has_no_weights():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for cmt_l"):
        timm.create_model("cmt_l", pretrained=True)


# ---- what people bring: other containers, other precisions, parts


@pytest.mark.parametrize("size", [(32, 128), (64, 128)])
def test_without_grids_the_model_s_own_shape_has_the_model_s_own_grid(size):
    model = timm.create_model(TI, img_size=size, num_classes=5)
    floats = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
    other = timm.create_model(TI, img_size=size, num_classes=5)
    other.load_state_dict(floats, strict=False)
    for a, b in zip(model.stages, other.stages):
        assert torch.equal(a.rel_pos_bias.weight, b.rel_pos_bias.weight)


def test_a_square_is_guessed_with_a_log_line(caplog):
    weights = {k: v for k, v in timm.create_model(TI, img_size=64).state_dict().items() if not k.endswith("query_grid")}
    with caplog.at_level("INFO", logger="timm_cmt"):
        timm.create_model(TI, img_size=96).load_state_dict(weights, strict=False)
    assert "stages.0.rel_pos_bias.weight has no grid beside it; taken for the square of 16 x 16 tokens" in caplog.text


def test_grids_survive_bfloat16():
    size = (1036, 64)  # 259 tokens high, which bfloat16 rounds to 260
    model = timm.create_model(TI, img_size=size)
    state = {key: value.bfloat16() for key, value in model.state_dict().items()}
    assert state["stages.0.rel_pos_bias.query_grid"][0] == 260
    other = timm.create_model(TI, img_size=size)
    other.load_state_dict(state)
    assert torch.equal(other.stages[0].rel_pos_bias.weight, model.stages[0].rel_pos_bias.weight.bfloat16().float())


@pytest.mark.parametrize("grid", [(256, 257), (257, 256)])  # as of 1024 x 1028 pixels
@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16])
def test_a_grid_is_not_taken_for_its_neighbour(grid, dtype):
    bias = RelPosBias(1, grid, sr_ratio=8, device="meta")
    assert bias.find_query_size(bias.weight, torch.tensor(grid, dtype=dtype), "weight") == grid


@pytest.mark.parametrize("features", [False, True])
def test_what_others_put_into_the_model_loads_back(features):
    model = timm.create_model(TI, img_size=64, depths=(1, 1, 2, 1), features_only=features)
    stage = model.stages_2 if features else model.stages[2]
    stage.blocks[1] = stage.blocks[0]  # a block that stands in two places
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    result = model.load_state_dict(model.state_dict(), strict=False)
    assert not result.missing_keys and not result.unexpected_keys


def test_the_classifier_s_weights_load_into_features_only_and_back():
    model, features = timm.create_model(TI, img_size=64), timm.create_model(TI, img_size=64, features_only=True)
    result = features.load_state_dict(model.state_dict(), strict=False)
    assert not result.missing_keys and {key.split(".")[0] for key in result.unexpected_keys} == {"final_conv", "head"}
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(features.eval()(x), model.eval().forward_intermediates(x, intermediates_only=True)):
            assert torch.equal(a, b)
    other = timm.create_model(TI, img_size=(64, 96))
    result = other.load_state_dict(features.state_dict(), strict=False)
    assert not result.unexpected_keys and {key.split(".")[0] for key in result.missing_keys} == {"final_conv", "head"}
    assert torch.equal(other.stages[2].blocks[3].attn.q.weight, model.stages[2].blocks[3].attn.q.weight)


def test_a_wrapper_takes_another_backbone_s_weights_without_strict():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = timm.create_model(TI)

    result = Detector().load_state_dict({"backbone.layer1.0.conv1.weight": torch.zeros(1)}, strict=False)
    assert result.unexpected_keys == ["backbone.layer1.0.conv1.weight"]


def test_loading_within_the_meta_device_keeps_the_checkpoint_s():
    state = timm.create_model(TI, img_size=64).state_dict()
    with torch.device("meta"):
        model = timm.create_model(TI, img_size=96)
        model.load_state_dict(state, assign=True)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert model.state_dict()["stages.0.rel_pos_bias.query_grid"].tolist() == [24, 24]


def prune_bias(model: nn.Module) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(model.stages[1].rel_pos_bias, "weight", 0.2)


def parametrize_bias(model: nn.Module) -> None:
    from torch.nn.utils import parametrizations

    parametrizations.weight_norm(model.stages[1].rel_pos_bias)


@pytest.mark.parametrize("change", [prune_bias, parametrize_bias])
def test_a_changed_bias_loads_its_own_state_dict(change):
    model, other = (timm.create_model(TI, img_size=64) for _ in range(2))
    change(model), change(other)
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), other.eval()(x))


def test_taking_a_state_dict_changes_nothing_in_the_model():
    model = timm.create_model(TI)
    before = {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    model.state_dict()
    assert before == {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


# ---- files


class RunsCode:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("source", ["cache", "file"])
def test_a_pickle_with_code_is_refused(source, torch_home, tmp_path, capfd, release_server):
    path = tmp_path / "evil.pth"
    torch.save(dict(model=authors_weights(TI), extra=RunsCode()), path)
    overlay = dict(file=str(path))
    if source == "cache":
        release_server.content = path.read_bytes()
        overlay = dict(url=release_server.url)
    with pytest.raises(RuntimeError, match="refused: beside tensors it holds .*print"):
        timm.create_model(TI, pretrained=True, pretrained_cfg_overlay=overlay)
    assert "code ran" not in capfd.readouterr().out
    assert not list(torch_home.iterdir())


def test_the_command_line_in_a_checkpoint_is_allowed_during_our_build_only(torch_home, authors_file):
    (torch_home / RELEASE_FILES[TI]).write_bytes(authors_file.read_bytes())
    timm.create_model(TI, pretrained=True)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(authors_file, weights_only=True)


def test_what_a_user_allows_in_pickles_stays_allowed(torch_home, authors_file):
    (torch_home / RELEASE_FILES[TI]).write_bytes(authors_file.read_bytes())
    with torch.serialization.safe_globals([argparse.Namespace]):
        timm.create_model(TI, pretrained=True)
        assert argparse.Namespace in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_named(suffix, tmp_path):
    path = tmp_path / f"short{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(timm.create_model(TI).state_dict(), path)
    path.write_bytes(path.read_bytes()[:1_000_000])
    with pytest.raises(RuntimeError, match=f"{path} is cut short or no checkpoint"):
        timm.create_model(TI, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


def test_a_truncated_file_of_torch_s_old_format_is_named(tmp_path):
    path = tmp_path / "short.pth"
    torch.save(authors_weights(TI), path, _use_new_zipfile_serialization=False)
    timm.create_model(TI, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    path.write_bytes(path.read_bytes()[:10_000_000])
    with pytest.raises(RuntimeError, match=f"{path} is cut short or no checkpoint"):
        timm.create_model(TI, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at .*none.pth"):
        timm.create_model(TI, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "none.pth")))


class ReleaseServer(http.server.ThreadingHTTPServer):
    """Serves `content`; cuts it after `sent` bytes where that is set, and counts the downloads."""

    content = b""
    sent: int | None = None
    downloads = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/release/{RELEASE_FILES[TI]}"


class ReleaseHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        if not server.content:
            return self.send_error(404)
        server.downloads += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(server.content)))
        self.end_headers()
        self.wfile.write(server.content[: server.sent])

    def log_message(self, *args):
        pass


@pytest.fixture
def release_server():
    server = ReleaseServer(("127.0.0.1", 0), ReleaseHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_download_shows_progress_and_is_kept(torch_home, authors_file, release_server, expected_logits, capfd):
    release_server.content = authors_file.read_bytes()
    for _ in range(2):
        model = timm.create_model(TI, pretrained=True, pretrained_cfg_overlay=dict(url=release_server.url))
        assert_is(model, expected_logits)
    assert release_server.downloads == 1
    assert [path.name for path in torch_home.iterdir()] == [RELEASE_FILES[TI]]
    assert "100%" in capfd.readouterr().err


def test_cache_dir_is_used(tmp_path, torch_home, authors_file, release_server, expected_logits):
    release_server.content = authors_file.read_bytes()
    overlay = dict(url=release_server.url)
    model = timm.create_model(TI, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / "mine")
    assert_is(model, expected_logits)
    assert (tmp_path / "mine" / RELEASE_FILES[TI]).exists() and not list(torch_home.iterdir())


def test_a_truncated_file_in_the_cache_is_named_and_fetched_again(
    torch_home, authors_file, release_server, expected_logits, caplog
):
    release_server.content = authors_file.read_bytes()
    path = torch_home / RELEASE_FILES[TI]
    path.write_bytes(release_server.content[:5_000_000])
    model = timm.create_model(TI, pretrained=True, pretrained_cfg_overlay=dict(url=release_server.url))
    assert_is(model, expected_logits)
    assert str(path) in caplog.text and "Downloading it again" in caplog.text
    assert path.read_bytes() == release_server.content


def test_a_download_cut_short_is_an_error_and_leaves_nothing(torch_home, authors_file, release_server):
    release_server.content, release_server.sent = authors_file.read_bytes(), 3_000_000
    with pytest.raises(RuntimeError, match="127.0.0.1.* is cut short"):
        timm.create_model(TI, pretrained=True, pretrained_cfg_overlay=dict(url=release_server.url))
    assert not list(torch_home.iterdir())


def test_a_release_that_is_not_there_is_an_error_that_names_it(torch_home, release_server):
    with pytest.raises(RuntimeError, match="cmt_tiny.pth could not be downloaded .*404"):
        timm.create_model(TI, pretrained=True, pretrained_cfg_overlay=dict(url=release_server.url))
    assert not list(torch_home.iterdir())


def test_the_release_s_addresses():
    files = dict(cmt_ti="cmt_tiny.pth", cmt_xs="cmt_xs.pth", cmt_s="cmt_small.pth", cmt_b="cmt_base.pth")
    base = "https://github.com/ggjy/CMT.pytorch/releases/download/release-v1/"
    assert {name: timm.get_pretrained_cfg(name).url for name in files} == {name: base + files[name] for name in files}
