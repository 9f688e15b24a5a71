"""`timm-cmt convert` on checkpoints that timm's train.py has written: the folder is the model as it was trained."""

import json

import pytest
import timm
import torch
from test_scripts import data, pytestmark, run  # noqa: F401 (a fixture, and the skip without TIMM_SRC)

from timm_cmt.cli import main

SMALL = "--model-kwargs img_size=64 depths=1,1,1,1"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            f"{SMALL} act_layer=silu embed_dims=32,64,128,256 mlp_ratio=2.5 --gp max --mean 0.5 --std 0.25 "
            "--crop-pct 1.0 --interpolation bilinear --model-ema --model-ema-decay 0.5 --amp --amp-dtype bfloat16",
            dict(input_size=(3, 64, 64), mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0, interpolation="bilinear"),
        ),
        (
            f"{SMALL} --gp catavgmax --in-chans 1",
            dict(input_size=(1, 64, 64), mean=(0.449,), std=(0.226,), crop_pct=0.875, interpolation="bicubic"),
        ),
        (
            "--input-size 3 64 96 --model-kwargs img_size=64,96 depths=1,1,1,1",
            dict(
                input_size=(3, 64, 96), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_pct=0.875,
                interpolation="bicubic",
            ),
        ),
    ],
    ids=["pooling, widths, activation, averaged", "one channel", "no square"],
)  # fmt: skip
def test_the_folder_is_the_model_that_train_py_trained(options, expected, data, tmp_path):  # noqa: F811
    run(
        f"train.py --data-dir {data} --model cmt_ti --num-classes 10 --epochs 1 --batch-size 16 --opt adamw --lr 1e-3 "
        f"--warmup-epochs 0 --workers 0 --device cpu --img-size 64 --output out --experiment test {options}",
        tmp_path,
    )
    path, folder = tmp_path / "out" / "test" / "last.pth.tar", tmp_path / "converted"
    assert main(["convert", str(path), "--out", str(folder)]) == 0

    args = torch.load(path, weights_only=False)["args"]
    trained = timm.create_model(
        args.model, num_classes=10, in_chans=args.in_chans, global_pool=args.gp, checkpoint_path=str(path),
        **args.model_kwargs,
    ).eval()  # fmt: skip
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, *expected["input_size"])
    with torch.inference_mode():
        assert torch.equal(loaded(x), trained(x))
    found = timm.data.resolve_data_config(model=loaded)
    found |= dict(mean=tuple(found["mean"]), std=tuple(found["std"]))
    for key, value in expected.items():
        assert found[key] == value if isinstance(value, str) else found[key] == pytest.approx(value), key
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == [str(digit) for digit in range(10)]
    assert not {"tag", "license", "origin_url"} & config["pretrained_cfg"].keys()


def test_validate_has_the_same_results_for_the_folder_without_any_option(data, tmp_path):  # noqa: F811
    options = f"{SMALL} --img-size 64 --num-classes 10 --crop-pct 1.0 --gp max --mean 0.5 --std 0.25"
    run(
        f"train.py --data-dir {data} --model cmt_ti --epochs 2 --batch-size 16 --opt adamw --lr 1e-3 --warmup-epochs 0 "
        f"--workers 0 --device cpu --output out --experiment test {options}",
        tmp_path,
    )
    path, folder = tmp_path / "out" / "test" / "last.pth.tar", tmp_path / "converted"
    assert main(["convert", str(path), "--out", str(folder)]) == 0
    common = f"validate.py --data-dir {data} --device cpu --workers 1 -b 10"
    found, expected = (
        json.loads(run(f"{common} {more}", tmp_path).partition("--result\n")[2])
        for more in (f"--model local-dir:{folder} --pretrained", f"--model cmt_ti --checkpoint {path} {options}")
    )
    for key in ("top1", "top5", "img_size", "crop_pct", "interpolation", "param_count"):
        assert found[key] == expected[key], key
