"""transformers on a local directory: its timm wrapper and its timm backbone give what timm gives."""

from pathlib import Path

import pytest
import timm
import torch
from common import RELEASE_FILES, authors_weights
from PIL import Image

from timm_cmt.cli.convert import convert, convert_release

transformers = pytest.importorskip("transformers", reason="NOT TESTED: transformers; pip install transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """cmt_ti as `timm-cmt convert` writes it."""
    folder = tmp_path_factory.mktemp("transformers")
    cache = folder / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(dict(model=authors_weights("cmt_ti")), cache / RELEASE_FILES["cmt_ti"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(folder / "torch"))
        convert_release("cmt_ti", folder / "cmt_ti.in1k")
    return folder / "cmt_ti.in1k"


@pytest.fixture(scope="module")
def model(folder) -> torch.nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def test_the_automatic_model_has_timm_s_logits(folder, model):
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    x = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        torch.testing.assert_close(wrapped(x).logits, model(x), rtol=1e-5, atol=1e-5)


def test_another_size_needs_no_argument_and_can_be_set_after_loading(folder, model):
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(wrapped(x).logits, expected, rtol=1e-5, atol=1e-5)
        wrapped.timm_model.set_input_size(96)
        torch.testing.assert_close(wrapped(x).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_pipeline_has_timm_s_probabilities(folder, model):
    image = Image.effect_mandelbrot((320, 240), (-2, -1, 1, 1), 50).convert("RGB")
    best = transformers.pipeline("image-classification", model=str(folder), top_k=5)(image)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    with torch.inference_mode():
        expected = model(transform(image)[None]).softmax(-1)[0].topk(5)
    assert [entry["score"] for entry in best] == pytest.approx(expected.values.tolist(), rel=1e-4)
    assert [entry["label"] for entry in best] == [
        timm.data.ImageNetInfo().index_to_description(int(index)) for index in expected.indices
    ]


def test_one_s_own_model_has_its_pooling_widths_and_class_names(tmp_path):
    kwargs = dict(depths=(1, 1, 2, 1), embed_dims=(16, 32, 64, 128), act_layer="silu", img_size=64)
    model = timm.create_model("cmt_ti", num_classes=3, global_pool="max", **kwargs).eval()
    torch.save(model.state_dict(), tmp_path / "own.pth")
    (tmp_path / "names.txt").write_text("cat\ndog\ncow\n")
    given = dict(model="cmt_ti", gp="max", model_kwargs=kwargs)
    convert(tmp_path / "own.pth", tmp_path / "own", given, labels=tmp_path / "names.txt")
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "own").eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(wrapped(x).logits, model(x), rtol=1e-5, atol=1e-5)
    assert wrapped.config.id2label == {0: "cat", 1: "dog", 2: "cow"}


def test_the_backbone_with_the_weights_loaded_has_timm_s_feature_maps(folder):
    features = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
    backbone = transformers.TimmBackbone(transformers.TimmBackboneConfig(backbone="cmt_ti", out_indices=[1, 2, 3, 4]))
    backbone._backbone.load_state_dict(features.state_dict())
    x = torch.randn(1, 3, 96, 128)
    with torch.inference_mode():
        maps, expected = backbone.eval()(x).feature_maps, features(x)[1:]
    assert [tuple(each.shape[1:]) for each in maps] == [(46, 24, 32), (92, 12, 16), (184, 6, 8), (368, 3, 4)]
    for actual, each in zip(maps, expected):
        torch.testing.assert_close(actual, each, rtol=1e-5, atol=1e-5)
