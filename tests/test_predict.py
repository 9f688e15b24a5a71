"""timm-cmt predict: the classes that the model gives, by their names, of whatever a model is in."""

import io
import json
import shutil
import sys

import pytest
import timm
import torch
from common import RELEASE_FILES, SMALL, authors_weights
from PIL import Image
from test_convert import save

from timm_cmt.cli import main
from timm_cmt.cli.convert import convert

NAMES = [f"name {i}" for i in range(10)]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A checkpoint of a model that likes its classes in the order of their numbers, that model's folder, a picture."""
    folder = tmp_path_factory.mktemp("desk")
    model = timm.create_model("cmt_ti", **SMALL)
    with torch.no_grad():
        model.head.weight.mul_(1e-3)
        model.head.bias.copy_(-torch.arange(10))
    torch.save(model.state_dict(), folder / "own.pth")
    (folder / "names.txt").write_text("\n".join(NAMES))
    given = dict(model="cmt_ti", model_kwargs=dict(depths=SMALL["depths"]))
    convert(folder / "own.pth", folder / "mine", given, labels=folder / "names.txt")
    Image.effect_mandelbrot((96, 80), (-2, -1, 1, 1), 50).convert("RGB").save(folder / "image.png")
    return folder


def lines(capsys, *arguments) -> list[str]:
    assert main(["predict", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def test_predict_prints_the_five_likeliest_as_timm_prepares_the_picture(desk, capsys):
    picture, *found = lines(capsys, desk / "mine", desk / "image.png")
    model = timm.create_model(f"local-dir:{desk / 'mine'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    with torch.inference_mode():
        expected = model(transform(Image.open(desk / "image.png"))[None])[0].softmax(0)
    assert picture == str(desk / "image.png")
    assert found == [f"{100 * expected[i]:7.2f} %  name {i}" for i in range(5)]


def test_predict_takes_a_checkpoint_at_another_size_and_numbers_what_has_no_name(desk, capsys):
    options = ["--model", "cmt_ti", "--size", "64x96", "--model-kwargs", "depths=(1,1,2,1)"]
    found = lines(capsys, desk / "own.pth", desk / "image.png", *options)
    assert [line.split("%  ")[-1] for line in found[1:]] == [f"class {i}" for i in range(5)]


def test_a_checkpoint_of_a_thousand_classes_of_one_s_own_has_not_imagenet_s_names(desk, tmp_path, capsys):
    save(tmp_path / "last.pth.tar", timm.create_model("cmt_ti", **{**SMALL, "num_classes": 1000}), model_kwargs=SMALL)
    found = lines(capsys, tmp_path / "last.pth.tar", desk / "image.png")
    assert all("%  class " in line for line in found[1:])


def test_what_a_checkpoint_does_not_say_is_named(desk, tmp_path, capsys):
    options = ["--model", "cmt_ti", "--model-kwargs", "depths=(1,1,2,1)"]
    assert main(["predict", str(desk / "own.pth"), str(desk / "image.png"), *options]) == 0
    assumed = "global_pool, mean, std, crop_pct, interpolation"
    assert capsys.readouterr().err == f"{desk / 'own.pth'} does not say {assumed}; the model's defaults are taken\n"
    save(tmp_path / "last.pth.tar", timm.create_model("cmt_ti", **SMALL), model_kwargs=SMALL)
    assert main(["predict", str(tmp_path / "last.pth.tar"), str(desk / "image.png")]) == 0
    assert not capsys.readouterr().err


def test_a_model_of_one_channel_that_an_older_timm_saved_with_three_means(desk, tmp_path, capsys):
    model = timm.create_model("cmt_ti", in_chans=1, **SMALL)
    save(tmp_path / "last.pth.tar", model, model_kwargs=SMALL)
    convert(tmp_path / "last.pth.tar", tmp_path / "grey")
    config = json.loads((tmp_path / "grey" / "config.json").read_text())
    config["pretrained_cfg"].update(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    (tmp_path / "grey" / "config.json").write_text(json.dumps(config))
    assert len(lines(capsys, tmp_path / "grey", desk / "image.png")) == 6


def test_a_configuration_that_is_cut_is_named(desk, tmp_path, capsys):
    shutil.copytree(desk / "mine", tmp_path / "mine")
    (tmp_path / "mine" / "config.json").write_text("")
    assert main(["predict", str(tmp_path / "mine"), str(desk / "image.png")]) == 1
    assert f"{tmp_path / 'mine'} cannot be read (Expecting value" in capsys.readouterr().err


def test_broken_notes_of_a_camera_leave_the_picture(desk, tmp_path, capsys):
    image = Image.open(desk / "image.png")
    image.save(tmp_path / "notes.png", exif=b"Exif\0\0II*\0")
    assert (
        lines(capsys, desk / "mine", tmp_path / "notes.png")[1:] == lines(capsys, desk / "mine", desk / "image.png")[1:]
    )


def test_a_name_that_the_terminal_cannot_show_is_escaped(desk, tmp_path, monkeypatch):
    shutil.copy(desk / "image.png", tmp_path / "猫.png")
    screen = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["predict", str(desk / "mine"), str(tmp_path / "猫.png")]) == 0
    assert b"\\u732b.png" in screen.buffer.getvalue()


def test_a_file_that_is_no_picture_is_one_line_and_the_others_are_predicted(desk, tmp_path, capsys):
    (tmp_path / "cut.png").write_bytes((desk / "image.png").read_bytes()[:200])
    bad = [desk / "names.txt", tmp_path / "cut.png", tmp_path, tmp_path / "none.png"]
    with pytest.raises(SystemExit) as end:
        main(["predict", str(desk / "mine"), *map(str, bad), str(desk / "image.png")])
    printed = capsys.readouterr()
    assert end.value.code == 1 and len(printed.out.splitlines()) == 6
    for path, line in zip(bad, printed.err.splitlines(), strict=True):
        assert line.startswith(f"timm-cmt: error: {path} is no picture that can be read (")


def test_a_picture_that_would_take_all_memory_is_one_line(desk, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000_000)
    Image.new("1", (2500, 2000)).save(tmp_path / "huge.png")
    Image.new("1", (1, 100_000)).save(tmp_path / "line.png")  # timm would make 73 x 7 300 000 pixels of it
    with pytest.raises(SystemExit):
        main(["predict", str(desk / "mine"), str(tmp_path / "huge.png"), str(tmp_path / "line.png")])
    huge, line = capsys.readouterr().err.splitlines()
    assert huge.endswith("huge.png has more than 4 million pixels; make it smaller")
    assert line.endswith(
        "line.png is no picture that can be read (1 x 100000 pixels are a line; cut a piece out of it)"
    )


def test_the_authors_weights_have_imagenet_s_names(desk, torch_home, capsys):
    weights = authors_weights("cmt_ti")
    weights["head.weight"].mul_(1e-3)
    weights["head.bias"].copy_(torch.arange(1000) == 281)
    torch.save(dict(model=weights), torch_home / RELEASE_FILES["cmt_ti"])
    found = lines(capsys, "cmt_ti", desk / "image.png", "--size", 64)
    assert found[1].endswith("%  tabby, tabby cat")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (
            "resnet50",
            [],
            "there is no checkpoint and no folder resnet50, and no CMT of that name",
        ),
        ("runs/cmt_s", [], "there is no checkpoint and no folder runs/cmt_s, and no CMT of that name"),
        ("output/best.pth.tar", [], "there is no checkpoint and no folder output/best.pth.tar"),
        ("d:best.pth", [], "there is no checkpoint and no folder d:best.pth"),
        ("cmt_l", [], "there are no pretrained weights of cmt_l; name a checkpoint"),
        (".", [], "local-dir:. cannot be read ("),
        ("cmt_ti", ["--model", "cmt_ti"], "cmt_ti is no checkpoint, and says itself what it is; leave out --model"),
    ],
)
def test_what_is_no_model_is_one_line(source, options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", source, "image.png", *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"timm-cmt: error: {message}") and error.count("\n") == 1, error
