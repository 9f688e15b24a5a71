"""The command line: it takes its options, ends as a program should, and what a user gets wrong is one line."""

import argparse
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import timm
import torch
from common import MODELS, SMALL
from PIL import Image

from timm_cmt.cli import demo, main
from timm_cmt.cli.demo import write_digits

COMMANDS = ["demo", "plot-bias", "convert", "export", "predict", "app", "publish", "recipe", "cost", "hub-configs"]


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess:
    """The command in a process of its own; only where that is the point."""
    command = [sys.executable, "-m", "timm_cmt", *arguments]
    return subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, timeout=60)


def fail(capsys, *arguments: str) -> str:
    """The one line on stderr of a command that fails."""
    try:
        status = main(arguments)
    except SystemExit as end:  # argparse's own errors
        status = end.code
    error = capsys.readouterr().err
    assert status not in (0, None) and error.startswith("timm-cmt: error: ") and error.count("\n") == 1, error
    return error


# ---- how it starts and ends


def test_help_imports_neither_torch_nor_timm():
    code = "import sys, timm_cmt.cli.command_line as c; c._build_parser().format_help(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "timm", "numpy"} & set(done.stdout.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_no_default_where_there_is_none(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0 and "None" not in capsys.readouterr().out


def test_importing_main_runs_nothing():
    done = subprocess.run([sys.executable, "-c", "import timm_cmt.__main__; print('goes on')"], capture_output=True)
    assert done.returncode == 0 and done.stdout == b"goes on\n" and not done.stderr


def test_version_names_what_matters(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert f"timm {timm.__version__}, torch {torch.__version__}" in capsys.readouterr().out


def test_a_reader_that_has_had_enough_is_no_error():
    command = f"set -o pipefail; {sys.executable} -m timm_cmt recipe cmt_s | true"
    for _ in range(3):  # `true` may be gone before or after the line is written
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert done.returncode in (0, 141) and not done.stderr
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "timm_cmt", "recipe", "cmt_s"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 141 and not done.stderr


@pytest.mark.parametrize("module", ["numpy.linalg", "timm.layers"])  # torch imports numpy, and goes on after an error
def test_ctrl_c_while_torch_and_timm_are_imported_is_status_130_and_one_line(module, tmp_path):
    code = f"""
import os, signal, sys

waited_for = [{module!r}]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores the interrupt

def interrupt(event, args):
    if event == "import" and waited_for and args[0] == waited_for[0]:
        waited_for.clear()
        os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(interrupt)
from timm_cmt.cli import main
sys.exit(main(["convert", "--model", "cmt_ti", "--out", "new"]))
"""
    environ = {**os.environ, "TORCH_HOME": "/dev/null/x"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr == "timm-cmt: error: interrupted\n"


def test_ctrl_c_at_work_is_status_130_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "write_digits", lambda _: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores the interrupt
    try:
        assert main(["demo", "--output", str(tmp_path / "new")]) == 130
        assert capsys.readouterr().err == "timm-cmt: error: interrupted\n"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_waiting_threads_leave_the_processors_to_others():
    code = "import os; from timm_cmt.cli import main; main(['recipe', 'cmt_s']); print(os.environ['OMP_WAIT_POLICY'])"
    environ = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert done.stdout.split()[-1] == "passive"


# ---- what a user gets wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--epochs", "0"], "0 is no number of epochs; give 1 or more"),
        (["demo", "--epochs", "many"], "many is no number of epochs"),
        (["demo", "--img-size", "31"], "31 is no image size for CMT; give 32 pixels or more"),
        (["demo", "--model", "resnet50"], f"resnet50 is no CMT; choose from {', '.join(MODELS)}"),
        (["demo", "--device", "abacus"], "abacus is no device here"),
        (["demo", "--device", "cuda:77"], "cuda:77 is no device here"),
        (["demo", "--output", "/dev/null/x"], "/dev/null/x"),
        (["demo", "--output", "."], "there is something in . already; name another folder by --output"),
        (
            ["demo", "--model", "cmt_l", "--pretrained", "--output", "new"],
            "there are no pretrained weights of cmt_l",
        ),
        (["plot-bias", "--size", "16"], "16 is no image size"),
        (["plot-bias", "--size", "64", "64", "64"], "has 3 numbers; give one or two"),
        (["plot-bias", "--checkpoint", "none.pth"], "there is no checkpoint at none.pth"),
        (["plot-bias", "--checkpoint", "."], ". is a folder; name a checkpoint"),
        (["plot-bias", "--model", "cmt_ti", "--out", "bias.docx"], "bias.docx: matplotlib writes no .docx"),
        (["plot-bias", "--model", "cmt_ti", "--out", "."], ". is a folder; name the picture to write"),
        (["plot-bias", "--model", "cmt_ti", "--out", "/dev/null/x/b.png"], "/dev/null/x cannot be read or written"),
        (["convert", "--out", "new"], "without a checkpoint, convert takes --model and --out alone"),
        (["convert", "--model", "cmt_l", "--out", "new"], "the authors have released no weights of cmt_l"),
        (["convert", "some.pth", "--out", "new", "--model-kwargs", "x"], "--model-kwargs x is no NAME=VALUE"),
        (["convert", "--model", "cmt_s"], "required: --out"),
        (["publish", "--org", "org", "--record", "none/hub.json"], "there is no folder none for --record"),
        (["demos"], "invalid choice: 'demos'"),
        ([], "required: COMMAND"),
    ],
)
def test_a_bad_value_is_one_line_and_a_non_zero_exit(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.pth").touch()
    assert message in fail(capsys, *arguments)


def test_a_missing_extra_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "timm-cmt[demo]" in fail(capsys, "demo", "--output", str(tmp_path / "new"))
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "timm_cmt.cli.app", raising=False)
    assert "gradio is not installed; pip install 'timm-cmt[app]' brings it" in fail(capsys, "app")


# ---- plot-bias


def test_plot_bias_draws_every_stage_and_head_and_a_colour_scale(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # text remains text
    assert main(["plot-bias", "--model", "cmt_ti", "--size", "96", "128", "--out", "new/bias.svg"]) == 0
    assert capsys.readouterr().out == "new/bias.svg (random weights; --pretrained draws learnt ones)\n"
    text = (tmp_path / "new" / "bias.svg").read_text()
    assert "cmt_ti with random weights" in text and "added before the softmax" in text
    assert len(re.findall(r">head \d<", text)) == 1 + 2 + 4 + 8
    assert re.findall(r">(\d+ x \d+)<", text) == ["160 x 160", "96 x 128"] * 2
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["bias.svg"]


def test_the_bias_s_picture_is_mostly_picture(tmp_path):
    assert main(["plot-bias", "--model", "cmt_ti", "--out", str(tmp_path / "bias.png")]) == 0
    picture = np.asarray(Image.open(tmp_path / "bias.png").convert("RGB"))
    assert picture.shape[1] > 900 and (picture.min(axis=-1) > 250).mean() < 0.5


def test_plot_bias_draws_a_checkpoint_of_one_channel(tmp_path, capsys):
    path, out = tmp_path / "grey.pth", tmp_path / "bias.png"
    model = timm.create_model("cmt_ti", in_chans=1, **SMALL)
    args = argparse.Namespace(model="cmt_ti", model_kwargs=SMALL, gp=None, mean=None, std=None, crop_pct=None)
    torch.save(dict(state_dict=model.state_dict(), args=args), path)
    assert main(["plot-bias", "--checkpoint", str(path), "--size", "96", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n" and out.exists()
    torch.save(model.state_dict(), path)
    options = ["--model", "cmt_ti", "--model-kwargs", "depths=1,1,2,1"]
    assert main(["plot-bias", "--checkpoint", str(path), *options, "--out", str(out)]) == 0


# ---- the demo


def test_a_third_of_every_digit_is_held_out(tmp_path):
    write_digits(tmp_path)
    counts = {split: len(list((tmp_path / split).glob("*/*.png"))) for split in ("train", "validation")}
    assert counts == dict(train=1198, validation=599)
    names = [{path.name for path in (tmp_path / split).glob("*/*.png")} for split in counts]
    assert not names[0] & names[1]
    assert all(55 <= len(list((tmp_path / "validation" / str(digit)).iterdir())) <= 62 for digit in range(10))


@pytest.fixture
def few_digits(monkeypatch):
    """For the demo: two images of each digit and split."""

    def write(folder: Path) -> None:
        for split in ("train", "validation"):
            for digit in range(10):
                (folder / split / str(digit)).mkdir(parents=True)
                for i in range(2):
                    Image.new("RGB", (64, 64), (25 * digit, 0, 0)).save(folder / split / str(digit) / f"{i}.png")

    monkeypatch.setattr(demo, "write_digits", write)
    monkeypatch.setattr(demo, "BATCH_SIZE", 10)


def test_the_demo_takes_its_options_and_keeps_one_checkpoint(tmp_path, few_digits, capsys):
    options = ["--epochs", "1", "--model", "cmt_xs", "--img-size", "32", "--device", "cpu"]
    assert main(["demo", *options, "--output", str(tmp_path / "out")]) == 0
    assert "--model cmt_xs --img-size 32" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["digits", "last.pth.tar", "predictions.png"]
    checkpoint = torch.load(tmp_path / "out" / "last.pth.tar", weights_only=False)
    assert checkpoint["state_dict_ema"]["stages.0.rel_pos_bias.query_grid"].tolist() == [8, 8]
    assert checkpoint["args"].model == "cmt_xs"


def test_the_demo_leaves_a_folder_alone_that_has_something_in_it(tmp_path, capsys):
    (tmp_path / "mine").touch()
    assert f"there is something in {tmp_path} already" in fail(capsys, "demo", "--output", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
