"""segmentation_models_pytorch's decoders on a CMT, by the name that it gives timm's models."""

import pytest
import timm
import torch
import torch.nn.functional as F
from common import MODELS, RELEASE_FILES, authors_weights

from timm_cmt.cmt import VARIANTS

smp = pytest.importorskip(
    "segmentation_models_pytorch",
    reason="NOT TESTED: segmentation_models_pytorch; pip install segmentation-models-pytorch and run "
    "pytest tests/integration/test_segmentation.py",
)

DECODERS = pytest.mark.parametrize("decoder", [smp.Unet, smp.FPN, smp.UPerNet], ids=lambda decoder: decoder.__name__)
CHANNELS = {name: [args["stem_width"], *args["embed_dims"]] for name, args in VARIANTS.items()}


def build(decoder: type, name: str = "tu-cmt_ti", **kwargs) -> torch.nn.Module:
    return decoder(name, encoder_weights=None, **kwargs)


@pytest.mark.parametrize("model", MODELS)
def test_the_encoder_has_a_map_at_every_stride_from_2_to_32(model):
    encoder = smp.encoders.get_encoder(f"tu-{model}", weights=None)
    assert encoder.out_channels == [3, *CHANNELS[model]]
    with torch.inference_mode():
        maps = encoder.eval()(torch.randn(1, 3, 32, 64))
    sizes = [(32 // stride, 64 // stride) for stride in (1, 2, 4, 8, 16, 32)]
    assert [tuple(x.shape[1:]) for x in maps] == [(c, *size) for c, size in zip(encoder.out_channels, sizes)]


def test_the_map_of_stride_2_is_the_stem_s():
    """Where a model has no such map, the library puts one of no channels in its place."""
    torch.manual_seed(0)
    encoder = smp.encoders.get_encoder("tu-cmt_s", weights=None).eval()
    model = timm.create_model("cmt_s").eval()
    assert not encoder.load_state_dict(
        {
            "model." + key.replace("stages.", "stages_"): value
            for key, value in model.state_dict().items()
            if key.startswith(("stem", "stages"))
        }
    ).missing_keys
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        maps = encoder(x)
        _, expected = model.forward_intermediates(x)
    assert maps[1].shape == (1, 32, 32, 32) and maps[1].std() > 0.1
    assert torch.equal(maps[1], model.stem(x))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(maps[1:], expected))


@DECODERS
def test_cmt_s_gives_a_mask_of_the_image_s_size(decoder):
    model = build(decoder, "tu-cmt_s", classes=3).eval()
    with torch.inference_mode():
        assert model(torch.randn(2, 3, 64, 96)).shape == (2, 3, 64, 96)


@DECODERS
def test_a_training_step_lowers_the_loss_and_reaches_stem_and_bias(decoder):
    torch.manual_seed(0)
    model = build(decoder, classes=3).train()
    images, masks = torch.randn(2, 3, 64, 96), torch.randint(3, (2, 64, 96))

    def loss() -> torch.Tensor:
        torch.manual_seed(1)  # the same dropout each time
        return F.cross_entropy(model(images), masks)

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = loss()
    before.backward()
    encoder = model.encoder.model
    for weight in (encoder.stem.conv1.weight, *(encoder[f"stages_{i}"].rel_pos_bias.weight for i in range(4))):
        assert weight.grad.isfinite().all() and weight.grad.any()
    optimizer.step()
    assert loss() < before


@pytest.mark.parametrize(
    ("decoder", "depth", "arguments"),
    [
        (smp.Unet, 3, dict(decoder_channels=(64, 32, 16))),
        (smp.Unet, 4, dict(decoder_channels=(64, 32, 16, 8))),
        (smp.FPN, 3, dict(upsampling=1)),  # the library's FPN says four-fold at any depth, which is for 5
        (smp.FPN, 4, dict(upsampling=2)),
        (smp.UPerNet, 3, {}),
        (smp.UPerNet, 4, {}),
    ],
)
def test_an_encoder_of_fewer_stages_builds_no_more_than_it_needs(decoder, depth, arguments):
    model = build(decoder, encoder_depth=depth, **arguments).eval()
    assert model.encoder.out_channels == [3, *CHANNELS["cmt_ti"][:depth]]
    assert list(model.encoder.model) == ["stem", *(f"stages_{i}" for i in range(depth - 1))]
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 64, 96)).shape == (1, 1, 64, 96)


def test_weights_and_preprocessing_are_those_of_the_model(torch_home):
    torch.save(dict(model=authors_weights("cmt_ti")), torch_home / RELEASE_FILES["cmt_ti"])
    expected = timm.create_model("cmt_ti", pretrained=True)
    encoder = smp.Unet("tu-cmt_ti", encoder_weights=True).encoder.model
    assert torch.equal(encoder.stem.conv1.weight, expected.stem.conv1.weight)
    assert torch.equal(encoder.stages_3.rel_pos_bias.weight, expected.stages[3].rel_pos_bias.weight)
    params = smp.encoders.get_preprocessing_params("tu-cmt_ti")
    assert params["mean"] == [0.485, 0.456, 0.406] and params["std"] == [0.229, 0.224, 0.225]


def test_other_channels_and_arguments_of_the_model():
    model = build(smp.Unet, in_channels=4, img_size=64, drop_path_rate=0.1).eval()
    assert model.encoder.model.stem.conv1.in_channels == 4
    assert model.encoder.model.stages_0.rel_pos_bias.query_size == (16, 16)
    assert model.encoder.model.stages_3.blocks[1].drop_path1.drop_prob == pytest.approx(0.1)
    with torch.inference_mode():
        assert model(torch.randn(1, 4, 64, 64)).shape == (1, 1, 64, 64)


@pytest.mark.parametrize("decoder", [smp.FPN, smp.UPerNet], ids=lambda decoder: decoder.__name__)
def test_sizes_that_32_does_not_divide_are_refused_by_the_library(decoder):
    with pytest.raises(RuntimeError, match=r"divisible by 32.*\(96, 96\)"):
        build(decoder).eval()(torch.randn(1, 3, 70, 96))


def test_unet_pads_nothing_and_gives_the_image_s_size_at_any_size():
    with torch.inference_mode():
        assert build(smp.Unet).eval()(torch.randn(1, 3, 70, 101)).shape == (1, 1, 70, 101)


def test_dilation_is_refused():
    """CMT has no output_stride; the library hands the argument on where it is not 32."""
    with pytest.raises(TypeError, match="output_stride"):
        smp.encoders.get_encoder("tu-cmt_ti", weights=None, output_stride=16)
