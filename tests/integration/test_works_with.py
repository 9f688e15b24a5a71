"""What takes a CMT by its name: each program trains or runs one, by the lines of benchmarks/examples/runtimes.md."""

from functools import partial

import pytest
import timm
import torch
from common import SMALL, images, need
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from timm_cmt.cli.convert import convert


def small(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("cmt_ti", **SMALL | kwargs)


def assert_gradients(module: nn.Module) -> None:
    assert not [name for name, p in module.named_parameters() if p.grad is None]


# ---- transformers: detectors and segmenters on a timm backbone

ATTENTION = dict(encoder_attention_heads=2, decoder_attention_heads=2, decoder_layers=2, num_queries=5, d_model=32)
DETR = dict(ATTENTION, encoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32)
RT_DETR = dict(
    ATTENTION,
    encoder_in_channels=[92, 184, 368],
    encoder_hidden_dim=32,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    decoder_in_channels=[32] * 3,
    num_denoising=0,
)
SEGMENTER = dict(feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, encoder_layers=1)
SEGMENTER.update(decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=5)


def backbone(first: int = 1):
    """The stages alone: 0 is the stem, at stride 2."""
    indices = list(range(first, 5))
    return need("transformers").TimmBackboneConfig(backbone="cmt_ti", out_indices=indices)


def assert_trains(model: nn.Module, **targets) -> None:
    model(images(2, 3, 64, 96), **targets).loss.backward()
    found = [module for module in model.modules() if type(module).__name__ == "FeatureListNet"]
    (cmt,) = {id(module): module for module in found}.values()
    assert [name for name, p in cmt.named_parameters() if p.grad is not None and p.grad.any()]


@pytest.mark.parametrize(
    ("name", "first", "arguments"),
    [
        ("Detr", 1, DETR),
        ("ConditionalDetr", 1, DETR),
        ("DeformableDetr", 1, dict(DETR, num_feature_levels=4)),
        ("RTDetr", 2, RT_DETR),
        ("DFine", 2, RT_DETR),
    ],
)
def test_transformers_detectors_train(name, first, arguments):
    transformers = need("transformers")
    config = getattr(transformers, f"{name}Config")(backbone_config=backbone(first), num_labels=3, **arguments)
    model = getattr(transformers, f"{name}ForObjectDetection")(config)
    label = dict(class_labels=torch.tensor([1]), boxes=torch.tensor([[0.5, 0.5, 0.2, 0.2]]))
    assert_trains(model, labels=[label, label])


def test_transformers_upernet_trains():
    transformers = need("transformers")
    config = transformers.UperNetConfig(
        backbone_config=backbone(), num_labels=5, hidden_size=32, auxiliary_in_channels=184, auxiliary_channels=16
    )
    model = transformers.UperNetForSemanticSegmentation(config)
    assert_trains(model, labels=torch.zeros(2, 64, 96, dtype=torch.int64))


@pytest.mark.parametrize("name", ["MaskFormerForInstanceSegmentation", "Mask2FormerForUniversalSegmentation"])
def test_transformers_mask_formers_train(name):
    transformers = need("transformers")
    if name.startswith("Mask2"):
        config = transformers.Mask2FormerConfig(backbone_config=backbone(), num_labels=3, **SEGMENTER)
    else:
        decoder = transformers.DetrConfig(backbone_config=backbone(), **DETR)
        sizes = dict(fpn_feature_size=32, mask_feature_size=32)
        config = transformers.MaskFormerConfig(
            backbone_config=backbone(), decoder_config=decoder, num_labels=3, **sizes
        )
    masks, classes = [torch.ones(1, 64, 96)] * 2, [torch.tensor([1])] * 2
    assert_trains(getattr(transformers, name)(config), mask_labels=masks, class_labels=classes)


def test_transformers_trainer_trains_what_convert_wrote(tmp_path):
    transformers = need("transformers")
    torch.save(small().state_dict(), tmp_path / "own.pth")
    convert(tmp_path / "own.pth", tmp_path / "mine", dict(model="cmt_ti", model_kwargs=dict(depths=SMALL["depths"])))
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "mine")
    before = model.timm_model.head.weight.detach().clone()
    data = [dict(pixel_values=x, labels=i) for i, x in enumerate(images(4))]
    arguments = dict(max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = transformers.Trainer(
        model, transformers.TrainingArguments(output_dir=str(tmp_path / "out"), **arguments), train_dataset=data
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "trained")
    assert not torch.equal(loaded.timm_model.head.weight, before)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)


# ---- training


def test_lightning_trains():
    lightning = need("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = small()

        def training_step(self, batch, _):
            return cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-3)

    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", **quiet)
    trainer.fit(Classifier(), DataLoader(TensorDataset(images(8), torch.arange(8)), 4))
    assert trainer.global_step == 2


@pytest.fixture
def colours(tmp_path):
    """A folder of red and blue pictures, and a mask for each."""
    for name in ("red", "blue", "masks"):
        (tmp_path / name).mkdir()
    for name in ("red", "blue"):
        for i in range(4):
            Image.new("RGB", (64, 64), name).save(tmp_path / name / f"{name}{i}.png")
            Image.new("L", (64, 64), name == "red").save(tmp_path / "masks" / f"{name}{i}.png")
    return tmp_path


def test_fastai_learns_colours_by_name(colours):
    vision = need("fastai.vision.all", "fastai")
    pictures = vision.get_image_files(colours, folders=["red", "blue"])
    given = dict(label_func=lambda path: path.parent.name, valid_pct=0.25, bs=3, num_workers=0)
    learner = vision.vision_learner(
        vision.ImageDataLoaders.from_path_func(colours, pictures, **given), "cmt_ti", pretrained=False
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit(1)
    assert learner.validate()[0] < 100  # a number


def test_fastai_s_unet_takes_a_partial_and_where_to_cut(colours):
    vision = need("fastai.vision.all", "fastai")
    pictures = vision.get_image_files(colours, folders=["red", "blue"])
    given = dict(codes=["blue", "red"], valid_pct=0.25, bs=3, num_workers=0)
    loaders = vision.SegmentationDataLoaders.from_label_func(
        colours, pictures, lambda path: colours / "masks" / path.name, **given
    )
    cut = dict(cut=lambda model: nn.Sequential(model.stem, *model.stages))
    learner = vision.unet_learner(loaders, partial(timm.create_model, "cmt_ti", **SMALL), pretrained=False, **cut)
    assert learner.model(images(1)).shape == (1, 2, 64, 64)
    with learner.no_bar(), learner.no_logging():
        learner.fit(1)


@pytest.mark.parametrize(
    ("modules", "adapters"), [(["q", "kv", "proj"], 15), (r".*\.mlp\.(conv1|conv2\.conv)", 10), ("all-linear", 15)]
)
def test_peft_adapts_and_merges(modules, adapters):
    peft = need("peft")
    model = small()
    config = peft.LoraConfig(r=4, target_modules=modules, modules_to_save=["head"])
    adapted = peft.get_peft_model(model, config)
    assert sum(name.endswith("lora_A") for name, _ in adapted.named_modules()) == adapters
    adapted(images()).sum().backward()
    torch.optim.SGD(adapted.parameters(), 0.1).step()
    adapted.eval()
    with torch.no_grad():
        expected = adapted(images())
        torch.testing.assert_close(adapted.merge_and_unload()(images()), expected, rtol=1e-4, atol=1e-4)


def test_peft_refuses_the_depthwise_convolutions():
    peft = need("peft")
    with pytest.raises(ValueError, match="groups"):
        peft.get_peft_model(small(), peft.LoraConfig(r=4, target_modules=r".*\.lpu\.conv"))


def test_accelerate_prepares_and_steps():
    accelerate = need("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = small()
    before = model.head.weight.detach().clone()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.backward(model(images()).square().mean())
    optimizer.step()
    assert not torch.equal(accelerator.unwrap_model(model).head.weight, before)


# ---- others


def test_open_clip_takes_the_name():
    open_clip = need("open_clip", "open_clip_torch")
    vision = dict(timm_model_name="cmt_ti", timm_pool="avg", timm_proj="linear", image_size=64)
    text = dict(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
    model = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)
    seen, read = model(images(2), torch.randint(0, 64, (2, 8)))[:2]
    assert seen.shape == read.shape == (2, 32)


def test_captum_has_torch_s_gradients_and_a_map_of_the_last_stage():
    attr = need("captum.attr", "captum")
    model, x = small().eval(), images(1)
    given = attr.InputXGradient(model).attribute(x, target=1)
    seen = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(seen)[0, 1], seen)
    torch.testing.assert_close(given, x * gradient)
    assert attr.LayerGradCam(model, model.stages[-1]).attribute(x, target=1).shape == (1, 1, 2, 2)


def test_lightly_s_loss_trains_a_cmt_without_classifier():
    need("lightly")
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    model = small(num_classes=0)
    head = SimCLRProjectionHead(model.num_features, 64, 32)
    NTXentLoss()(head(model(images())), head(model(images().flip(3)))).backward()
    assert_gradients(model)


def test_anomalib_takes_the_name():
    torch_model = need("anomalib.models.image.patchcore.torch_model", "anomalib")
    model = torch_model.PatchcoreModel(layers=["stages.0", "stages.1"], backbone="cmt_ti", pre_trained=False).train()
    assert model(images(2)).shape == (2 * 16 * 16, 46 + 92)


def test_mlflow_loads_what_it_saved(tmp_path):
    mlflow = need("mlflow")
    model, x = small().eval(), images(2)
    mlflow.pytorch.save_model(model, str(tmp_path / "model"), input_example=x.numpy())
    with torch.no_grad():
        torch.testing.assert_close(mlflow.pytorch.load_model(str(tmp_path / "model"))(x), model(x))
