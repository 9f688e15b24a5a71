"""The command line: it takes its options, and what a user gets wrong is one line."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from timm_cmt.cli import main
from timm_cmt.demo import write_digits


def timm_cmt(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "timm_cmt", *arguments], cwd=cwd, capture_output=True, text=True)


def test_the_demo_takes_its_options(tmp_path, monkeypatch, capsys):
    import timm_cmt.demo

    monkeypatch.setattr(timm_cmt.demo, "BATCH_SIZE", 512)
    options = ["--epochs", "1", "--model", "cmt_xs", "--img-size", "32", "--device", "cpu"]
    assert main(["demo", *options, "--output", str(tmp_path / "out")]) == 0
    assert "--model cmt_xs --img-size 32" in capsys.readouterr().out
    checkpoint = torch.load(tmp_path / "out" / "last.pth.tar", weights_only=False)
    assert checkpoint["state_dict"]["final_conv.0.conv.weight"].shape == (1280, 416, 1, 1)
    assert checkpoint["state_dict"]["stages.0.rel_pos_bias.query_grid"].tolist() == [8, 8]
    assert "state_dict_ema" in checkpoint
    assert not list((tmp_path / "out").glob("*.part*"))


def test_a_third_of_every_digit_is_held_out(tmp_path):
    write_digits(tmp_path)
    counts = {split: len(list((tmp_path / split).glob("*/*.png"))) for split in ("train", "validation")}
    assert counts == dict(train=1198, validation=599)
    names = [{path.name for path in (tmp_path / split).glob("*/*.png")} for split in counts]
    assert not names[0] & names[1]
    assert all(55 <= len(list((tmp_path / "validation" / str(digit)).iterdir())) <= 62 for digit in range(10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--epochs", "0"], "0 is no number of epochs; give 1 or more"),
        (["demo", "--epochs", "many"], "many is no number of epochs"),
        (["demo", "--img-size", "31"], "31 is no image size for CMT; give 32 pixels or more"),
        (["demo", "--model", "resnet50"], "invalid choice: 'resnet50'"),
        (["demo", "--device", "abacus"], "abacus is no device here"),
        (["demo", "--device", "cuda:77"], "cuda:77 is no device here"),
        (["demo", "--output", "/dev/null/x"], "/dev/null"),
        (["demo", "--model", "cmt_l", "--pretrained"], "No pretrained weights exist for cmt_l"),
        (["plot-bias", "--size", "16"], "16 is no image size"),
        (["plot-bias", "--size", "64", "64", "64"], "has 3 numbers; give one or two"),
        (["plot-bias", "--checkpoint", "none.pth"], "there is no checkpoint at none.pth"),
        (["plot-bias", "--out", "bias.docx"], "docx"),
        (["demos"], "invalid choice: 'demos'"),
        ([], "required: COMMAND"),
    ],
)
def test_a_bad_value_is_one_line_and_a_non_zero_exit(arguments, message, tmp_path):
    done = timm_cmt(*arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_plot_bias_draws_every_stage_and_head(tmp_path):
    path = tmp_path / "tiny.pth"
    torch.save(timm.create_model("cmt_ti", num_classes=3).state_dict(), path)
    done = timm_cmt("plot-bias", "--model", "cmt_ti", "--size", "96", "224", "--checkpoint", str(path), cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == "bias.png", done.stderr
    picture = Image.open(tmp_path / "bias.png")
    assert picture.width > 900 and picture.height > 900
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bias.png", "tiny.pth"]
    assert "--pretrained draws learnt ones" in timm_cmt("plot-bias", "--model", "cmt_ti", cwd=tmp_path).stdout


def test_version_names_what_matters():
    assert f"timm {timm.__version__}, torch {torch.__version__}" in timm_cmt("--version").stdout


def test_a_missing_extra_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["demo", "--output", str(tmp_path)]) == 1
    assert "timm-cmt[demo]" in capsys.readouterr().err
