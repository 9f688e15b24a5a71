"""torchvision's detectors on a CMT: the paper's size and cost, training, images of several sizes, bad arguments.

test_torchvision_scripts.py trains them by torchvision's train.py.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from common import MODELS
from PIL import Image
from timm.layers import freeze_batch_norm_2d, set_fused_attn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.ops import FrozenBatchNorm2d

from timm_cmt.detection import FPNBackbone, mask_rcnn, retinanet

BOTH = pytest.mark.parametrize("build", [retinanet, mask_rcnn])
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # more wait for each other where the cores are busy
COCO_CLASSES = 81  # with the background


def make_targets(*sizes: tuple[int, int]) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Noise images of (height, width) with two boxes each, whose masks are the upper halves of the boxes."""
    images, targets = [], []
    for height, width in sizes:
        boxes = torch.tensor([[4.0, 4, width / 2, height - 4], [width / 3, 8, width - 8, height / 2]])
        masks = torch.zeros(2, height, width, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
            mask[top : (top + bottom) // 2, left:right] = 1
        images.append(torch.rand(3, height, width))
        targets.append(dict(boxes=boxes, labels=torch.tensor([1, 2]), masks=masks))
    return images, targets


@pytest.fixture
def plain_attention():
    """torch's counter misses fused attention on the CPU."""
    set_fused_attn(False)
    yield
    set_fused_attn(True)


def count_macs(call) -> tuple[object, float, float]:
    """What `call` returns, and its G multiply-adds without attention's matrix products and in them."""
    with FlopCounterMode(display=False) as counter:
        result = call()
    by_operator = {str(op): flops / 2e9 for op, flops in counter.get_flop_counts()["Global"].items()}
    products = by_operator.pop("aten.bmm", 0.0)
    return result, sum(by_operator.values()), products


# README's table, and the terms below it: backbone, pyramid and heads, in G.
@pytest.mark.parametrize(
    ("build", "paper_params", "paper_macs", "params", "terms"),
    [
        (retinanet, 34.6, 231, 34570293, dict(pyramid=13.65, head=138.24)),
        (mask_rcnn, 44.5, 249, 44471341, dict(pyramid=52.10, proposals=50.62, box=14.31, mask=53.01)),
    ],
)
def test_cmt_s_has_the_paper_s_parameters_and_multiply_adds(
    build, paper_params, paper_macs, params, terms, plain_attention
):
    """Tables 12 and 13, within 2 %; their multiply-adds are without the two matrix products of attention.

    Counted at 1280 x 800, with 1000 proposals in the box head and 100 in the mask head.
    """
    with torch.device("meta"):
        model = build("cmt_s", COCO_CLASSES)
        counted = sum(param.numel() for param in model.parameters())
        model = build("cmt_s", COCO_CLASSES, img_size=(800, 1280)).eval()  # where the bias needs no resizing
    assert counted == params and params / 1e6 == pytest.approx(paper_params, rel=0.02)
    with torch.no_grad(), torch.device("meta"):
        features, backbone, products = count_macs(lambda: model.backbone.body(torch.empty(1, 3, 800, 1280)))
        features = {str(level): x for level, x in enumerate(features)}
        maps, *macs = count_macs(lambda: list(model.backbone.fpn(features).values()))
        found = dict(pyramid=macs[0])
        if build is retinanet:
            found["head"] = count_macs(lambda: model.head(maps))[1]
        else:
            heads, boxes, masks = model.roi_heads, torch.empty(1000, 256, 7, 7), torch.empty(100, 256, 14, 14)
            found["proposals"] = count_macs(lambda: model.rpn.head(maps))[1]
            found["box"] = count_macs(lambda: heads.box_predictor(heads.box_head(boxes)))[1]
            found["mask"] = count_macs(lambda: heads.mask_predictor(heads.mask_head(masks)))[1]
    assert found == pytest.approx(terms, abs=0.01)
    assert backbone == pytest.approx(78.04, abs=0.01)
    assert products == pytest.approx(24.576 + 12.288 + 32.768 + 3.072, abs=0.001)  # of the four stages
    assert backbone + sum(found.values()) == pytest.approx(paper_macs, rel=0.02)


@BOTH
def test_a_training_step_is_finite_and_reaches_stem_and_bias(build):
    torch.manual_seed(0)
    model = build("cmt_ti", 3, min_size=64, max_size=128, img_size=64).train()
    losses = model(*make_targets((64, 96), (80, 64)))
    assert losses.keys() >= ({"classification"} if build is retinanet else {"loss_mask", "loss_classifier"})
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    body = model.backbone.body
    for weight in (body.stem.conv1.weight, *(body[f"stages_{i}"].rel_pos_bias.weight for i in range(4))):
        assert weight.grad.isfinite().all() and weight.grad.any()


def test_a_step_with_frozen_batch_norm_leaves_its_statistics():
    model = retinanet("cmt_ti", 3, min_size=64, max_size=128)
    freeze_batch_norm_2d(model.backbone.body)
    before = {key: value.clone() for key, value in model.backbone.body.named_buffers()}
    sum(model.train()(*make_targets((64, 96))).values()).backward()
    assert "stages_3.blocks.1.mlp.norm.running_mean" in before
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.body.named_buffers())
    assert model.backbone.body.stem.conv1.weight.grad.any()


def test_gradient_checkpointing_of_the_stages_changes_no_gradient():
    torch.manual_seed(0)
    model = retinanet("cmt_ti", 3, min_size=64, max_size=128).train()
    batch = make_targets((64, 96), (96, 64))
    grads = []
    for enable in (False, True):
        model.backbone.body.set_grad_checkpointing(enable)
        model.zero_grad()
        sum(model(*batch).values()).backward()
        grads.append([param.grad for param in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*grads))


@BOTH
def test_images_of_several_sizes_in_one_batch(build):
    """Each image's boxes and masks come back in its own pixels."""
    torch.manual_seed(0)
    model = build("cmt_ti", 3, min_size=64, max_size=128).eval()
    model.score_thresh = 0.0  # untrained, RetinaNet is sure of nothing
    images, _ = make_targets((50, 120), (96, 64), (300, 200))
    with torch.inference_mode():
        outputs = model(images)
    for image, output in zip(images, outputs):
        height, width = image.shape[-2:]
        boxes = output["boxes"]
        assert len(boxes) and (boxes >= 0).all()
        assert boxes[:, 2].max() <= width and boxes[:, 3].max() <= height
        assert boxes[:, 2].max() > 0.8 * width and boxes[:, 3].max() > 0.8 * height
        assert output["labels"].min() >= 1 or build is retinanet  # which has no background among its scores
        if build is mask_rcnn:
            assert output["masks"].shape == (len(boxes), 1, height, width)


@pytest.mark.parametrize("detector", [FasterRCNN, FCOS])
def test_torchvision_s_other_detectors_take_the_backbone(detector):
    backbone = FPNBackbone("cmt_ti", **(dict(stages=(2, 3, 4), p6_p7=True) if detector is FCOS else {}))
    model = detector(backbone, 3, min_size=64, max_size=128).train()
    images, targets = make_targets((64, 96))
    assert all(loss.isfinite() for loss in model(images, targets).values())


def test_the_levels_of_the_pyramid():
    x = torch.randn(1, 3, 96, 160)
    with torch.inference_mode():
        r_cnn = FPNBackbone("cmt_ti", out_channels=32).eval()(x)
        retina = FPNBackbone("cmt_ti", stages=(2, 3, 4), p6_p7=True, out_channels=32).eval()(x)
    sizes = {4: (24, 40), 8: (12, 20), 16: (6, 10), 32: (3, 5), 64: (2, 3), 128: (1, 2)}
    assert [tuple(level.shape[1:]) for level in r_cnn.values()] == [(32, *sizes[s]) for s in (4, 8, 16, 32, 64)]
    assert [tuple(level.shape[1:]) for level in retina.values()] == [(32, *sizes[s]) for s in (8, 16, 32, 64, 128)]


def test_the_backbone_has_the_weights_of_a_folder(tmp_path):
    model = timm.create_model("cmt_ti")
    timm.models.save_for_hf(model, tmp_path, safe_serialization="both")
    body = mask_rcnn(f"local-dir:{tmp_path}", 2, pretrained=True).backbone.body
    state = model.state_dict()
    for key, value in body.state_dict().items():
        assert torch.equal(value, state[key.replace("stages_", "stages.")]), key


def test_images_are_normalised_as_for_the_weights(tmp_path):
    model = timm.create_model("cmt_ti", pretrained_cfg_overlay=dict(mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3)))
    timm.models.save_for_hf(model, tmp_path)
    transform = retinanet(f"local-dir:{tmp_path}", 2).transform
    assert transform.image_mean == [0.5, 0.4, 0.3] and transform.image_std == [0.1, 0.2, 0.3]


@BOTH
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(model_name="cmt_xxl"), f"model_name 'cmt_xxl' is no CMT; give one of {', '.join(MODELS)}"),
        (dict(model_name="resnet50"), "model_name 'resnet50' is no CMT"),
        (dict(num_classes=1), "num_classes 1 leaves none beside the background"),
        (dict(min_size=16), "min_size 16 is too small for CMT; give 32 pixels or more"),
        (dict(min_size=()), "min_size () is too small"),
        (dict(min_size=(64, 16)), "min_size (64, 16) is too small"),
        (dict(max_size=600), "max_size 600 is under min_size 800"),
        (dict(img_size=16), "img_size 16 is no size for CMT"),
    ],
)
def test_a_bad_argument_is_named(build, arguments, message):
    with pytest.raises(ValueError) as raised:
        build(**{"model_name": "cmt_ti", "num_classes": 3, **arguments})
    assert message in str(raised.value)


@pytest.mark.parametrize("stages", [(), (0, 1), (3, 5), (4, 1), (2, 2)])
def test_bad_stages_are_named(stages):
    with pytest.raises(ValueError, match="give some of 1, 2, 3, 4, in this order") as raised:
        FPNBackbone("cmt_ti", stages=stages)
    assert f"stages {stages}" in str(raised.value)


@BOTH
def test_an_unknown_argument_is_a_type_error(build):
    with pytest.raises(TypeError, match="drop_paths"):
        build("cmt_ti", 3, drop_paths=0.1)


def run_example(folder: Path, steps: int) -> float:
    """Train the example's RetinaNet; returns the mAP that it prints."""
    for package in ("pycocotools", "skimage"):
        pytest.importorskip(
            package,
            reason="NOT TESTED: training a detector on photographs; pip install pycocotools scikit-image and run "
            "pytest tests/integration/test_detection.py",
        )
    script = Path(__file__).parents[2] / "benchmarks" / "examples" / "detect.py"
    command = [sys.executable, script, "--detectors", "retinanet", "--steps", str(steps)]
    done = subprocess.run(command, cwd=folder, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(re.search(r"IoU=0.50:0.95 \| area=   all \| maxDets=100 \] = ([\d.]+)", done.stdout).group(1))


def test_the_example_prints_coco_s_table_and_draws_what_it_finds(tmp_path):
    assert 0 <= run_example(tmp_path, steps=2) <= 1
    assert Image.open(tmp_path / "detections.png").height > 1000
    assert [file.name for file in tmp_path.iterdir()] == ["detections.png"]


@pytest.mark.skipif(
    not os.environ.get("TIMM_CMT_EXAMPLES"),
    reason="NOT TESTED: that a detector learns the objects in photographs, which takes four minutes. Run "
    "TIMM_CMT_EXAMPLES=1 pytest tests/integration/test_detection.py -k learns",
)
def test_a_detector_learns_the_objects_in_photographs(tmp_path):
    """To a high mAP on the six photographs that it is trained on. The example's own 200 steps reach more."""
    assert run_example(tmp_path, steps=100) > 0.5  # training differs a little between processors


# ---- under torchvision's names

NAMES = [(f"{detector}_{variant}_fpn", variant) for detector in ("retinanet", "maskrcnn") for variant in MODELS]
LAYERS = ["stem", "stages_0", "stages_1", "stages_2", "stages_3"]


def get_model(name: str, **arguments):
    return torchvision.models.get_model(name, **arguments)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A folder with CMT-Ti, whose first convolution is all ones."""
    folder = tmp_path_factory.mktemp("weights")
    model = timm.create_model("cmt_ti", img_size=64)
    torch.nn.init.ones_(model.stem.conv1.weight)
    timm.models.save_for_hf(model, folder, safe_serialization="both")
    return folder


@pytest.mark.parametrize(("name", "variant"), NAMES)
def test_each_name_is_the_detector_of_its_variant(name, variant):
    with torch.device("meta"):
        model = get_model(name)
        body = timm.create_model(variant, features_only=True)
    detector = RetinaNet if name.startswith("retinanet") else MaskRCNN
    assert type(model) is detector and model.transform.min_size == (800,) and model.transform.max_size == 1333
    assert {k: v.shape for k, v in model.backbone.body.state_dict().items()} == {
        k: v.shape for k, v in body.state_dict().items()
    }
    classes = model.head.classification_head.num_classes if detector is RetinaNet else None
    assert (classes or model.roi_heads.box_predictor.cls_score.out_features) == 91  # COCO's


def test_a_detector_s_arguments_reach_it():
    with torch.device("meta"):
        model = get_model("maskrcnn_cmt_ti_fpn", num_classes=3, rpn_score_thresh=0.2, min_size=64, _skip_resize=True)
        several = get_model("retinanet_cmt_ti_fpn_ms", num_classes=3)
    assert model.rpn.score_thresh == 0.2 and model.transform.min_size == (64,) and model.transform._skip_resize
    assert model.roi_heads.mask_predictor.mask_fcn_logits.out_channels == 3
    assert several.transform.min_size == tuple(range(640, 801))  # the last is for evaluation


@pytest.mark.parametrize("layers", [None, 0, 1, 5])
def test_layers_are_frozen_from_the_stem_on_and_batch_norm_is_as_in_torchvision_s_resnet(layers, weights):
    body = get_model(
        "retinanet_cmt_ti_fpn", num_classes=3, weights_backbone=str(weights), trainable_backbone_layers=layers
    ).backbone.body
    trained = {name.partition(".")[0] for name, param in body.named_parameters() if param.requires_grad}
    frozen = {name.partition(".")[0] for name, param in body.named_parameters() if not param.requires_grad}
    last = 3 if layers is None else layers
    assert trained == set(LAYERS[5 - last :]) and frozen == set(LAYERS[: 5 - last])
    assert any(isinstance(module, FrozenBatchNorm2d) for module in body.modules())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in body.modules())
    assert (body.stem.conv1.weight == 1).all()


def test_without_weights_all_is_trained_with_batch_norm_and_fewer_layers_are_warned_of():
    with pytest.warns(UserWarning, match="trainable_backbone_layers 2 has no effect without weights_backbone"):
        body = get_model("retinanet_cmt_ti_fpn", trainable_backbone_layers=2).backbone.body
    assert all(param.requires_grad for param in body.parameters())
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in body.modules())


@pytest.mark.parametrize("source", ["folder", "local-dir", "file"])
def test_the_backbone_s_weights_come_from_a_folder_or_a_file(source, weights):
    source = {"folder": f"{weights}", "local-dir": f"local-dir:{weights}", "file": f"{weights}/model.safetensors"}[
        source
    ]
    body = get_model("maskrcnn_cmt_ti_fpn", num_classes=3, weights_backbone=source).backbone.body
    assert (body.stem.conv1.weight == 1).all()


def test_a_frozen_backbone_has_gradients_where_it_is_trained_alone(weights):
    torch.manual_seed(0)
    model = get_model("maskrcnn_cmt_ti_fpn", num_classes=3, weights_backbone=str(weights), min_size=64, max_size=128)
    before = {key: value.clone() for key, value in model.backbone.body.named_buffers()}
    sum(model.train()(*make_targets((64, 96), (80, 64))).values()).backward()
    trained = {
        name.partition(".")[0] for name, param in model.backbone.body.named_parameters() if param.grad is not None
    }
    assert trained == {"stages_1", "stages_2", "stages_3"}
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.body.named_buffers())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(weights="COCO_V1"), "weights 'COCO_V1' is unknown: no weights of retinanet_cmt_s_fpn have been released"),
        (
            dict(weights_backbone="IMAGENET1K_V1"),
            "weights_backbone IMAGENET1K_V1 is unknown, and no file or folder; give in1k, ",
        ),
        (dict(weights_backbone=torchvision.models.ResNet50_Weights.DEFAULT), "weights_backbone ResNet50_Weights.IMAGE"),
        (dict(trainable_backbone_layers=6), "trainable_backbone_layers 6 is not in the range; give 0 to 5"),
        (dict(trainable_backbone_layers=-1), "trainable_backbone_layers -1 is not in the range"),
    ],
)
def test_what_torchvision_s_builders_do_not_know_is_named(arguments, message):
    with pytest.raises(ValueError) as raised:
        get_model("retinanet_cmt_s_fpn", **arguments)
    assert message in str(raised.value)


@pytest.mark.parametrize("source", ["folder", "file"])
def test_another_variant_s_weights_are_refused(source, weights):
    source = str(weights if source == "folder" else weights / "model.safetensors")
    with pytest.raises((ValueError, RuntimeError), match="cmt_ti"):
        get_model("retinanet_cmt_s_fpn", weights_backbone=source)


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("make", [retinanet, mask_rcnn])
def test_images_of_other_channels_are_normalised_by_as_many_numbers(make, channels):
    model = make("cmt_ti", 3, min_size=64, max_size=96, in_chans=channels, depths=(1, 1, 1, 1)).eval()
    assert len(model.transform.image_mean) == len(model.transform.image_std) == channels
    with torch.no_grad():
        (out,) = model([torch.rand(channels, 64, 80)])
    assert out["boxes"].shape[1] == 4
