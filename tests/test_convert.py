"""Checkpoints become folders that timm loads bit for bit, whatever they were trained with. See also tests/integration,
where train.py itself has written them."""

import argparse
import json
import os
import pickle
import shutil
import signal
import stat
import tempfile

import pytest
import timm
import torch
from common import PARITY, RELEASE_FILES, SMALL, authors_weights, parity_input
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from timm.utils import CheckpointSaver, ModelEmaV3, reparameterize_model

from timm_cmt.cli import convert, main

ARGS = dict(  # what train.py always writes, as far as it matters; None is the model's default
    model="cmt_ti", model_kwargs={}, num_classes=10, gp=None, img_size=None, input_size=None, in_chans=None, mean=None,
    std=None, crop_pct=None, interpolation="", data=None, data_dir=None, dataset="", class_map="", train_split="train",
)  # fmt: skip


def save(path, trained, /, ema=None, **args) -> torch.nn.Module:
    """A checkpoint by timm's own saver, with train.py's arguments, or without any."""
    with tempfile.TemporaryDirectory() as work:
        saver = CheckpointSaver(
            trained,
            torch.optim.SGD(trained.parameters()),
            args=argparse.Namespace(**{**ARGS, **args}) if args else None,
            model_ema=ema,
            checkpoint_dir=work,
        )
        saver.save_checkpoint(0, metric=1.0)
        shutil.copy(f"{work}/last.pth.tar", path)
    return trained.eval()


def small(**kwargs) -> torch.nn.Module:
    return timm.create_model("cmt_ti", **{**SMALL, **kwargs})


def fail(capsys, *arguments) -> str:
    assert main(["convert", *map(str, arguments)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.fixture
def path(tmp_path):
    return tmp_path / "last.pth.tar"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def release(torch_home):
    torch.save(dict(model=authors_weights("cmt_ti")), torch_home / RELEASE_FILES["cmt_ti"])


def loaded(out) -> torch.nn.Module:
    return timm.create_model(f"local-dir:{out}", pretrained=True).eval()


def assert_same(model, out, channels: int = 3):
    x = torch.randn(2, channels, *model.pretrained_cfg["input_size"][1:])
    with torch.inference_mode():
        assert torch.equal(model(x), loaded(out)(x))


# ---- the release


def test_convert_without_a_checkpoint_is_the_authors_release_whatever_is_published(release, out, monkeypatch):
    monkeypatch.setenv("TIMM_CMT_HUB_ORG", "nobody")
    monkeypatch.setattr("timm_cmt.weights.get_hub_id", lambda name: f"nobody/{name}@{'0' * 40}")
    assert main(["convert", "--model", "cmt_ti", "--out", str(out)]) == 0
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    committed = PARITY.parents[1] / "hub_configs" / "cmt_ti.in1k"
    for name in ("README.md", "config.json"):
        assert (out / name).read_text() == (committed / name).read_text()
    model = timm.create_model(
        "cmt_ti", pretrained=True, pretrained_cfg_overlay=dict(state_dict=authors_weights("cmt_ti"))
    ).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(out)(parity_input(160)), model(parity_input(160)))


def test_weights_of_one_s_own_are_not_said_to_be_the_authors(path, out):
    save(path, timm.create_model("cmt_ti"), num_classes=1000)
    assert main(["convert", str(path), "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    assert not {"tag", "license", "origin_url"} & config["pretrained_cfg"].keys()
    card = ModelCard.load(out / "README.md")
    assert card.data.license is None and card.data.eval_results is None and "authors" not in card.text


# ---- what training used


def test_what_train_py_was_told_is_kept(path, out, capsys):
    kwargs = dict(
        depths=(1, 1, 2, 1), embed_dims=(16, 32, 64, 128), mlp_ratio=2.5, stem_width=8, num_heads=(1, 1, 2, 2),
        act_layer="silu", recompute_act=False, img_size=(64, 96),
    )  # fmt: skip
    model = timm.create_model("cmt_ti", num_classes=10, global_pool="max", in_chans=1, **kwargs)
    save(path, model, model_kwargs=kwargs, gp="max", mean=[0.2], std=[0.3], crop_pct=0.9, interpolation="bilinear")
    assert main(["convert", str(path), "--out", str(out)]) == 0
    assert_same(model, out, channels=1)
    data = timm.data.resolve_data_config(model=loaded(out))
    assert data == dict(
        input_size=(1, 64, 96), interpolation="bilinear", mean=[0.2], std=[0.3], crop_pct=0.9, crop_mode="center"
    )
    printed = capsys.readouterr().out
    assert "global_pool: max (from the arguments of train.py in the checkpoint)\n" in printed
    assert "in_chans: 1 (from the shapes of the weights)\n" in printed and printed.endswith(f"{out}\n")


def test_what_train_py_was_not_told_is_the_model_s_default_and_said_to_be(path, out, capsys):
    save(path, small(), model_kwargs=dict(SMALL, num_classes=10))
    assert main(["convert", str(path), "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["model_args"] == dict(depths=[1, 1, 2, 1], img_size=[64, 64])
    printed = capsys.readouterr().out
    assert "crop_pct: 0.875 (the model's default, which train.py used)\n" in printed
    assert "mean: 0.485 0.456 0.406 (the model's default, which train.py used)\n" in printed


def test_options_go_before_what_the_checkpoint_says(path, out, capsys):
    model = save(path, small(act_layer="silu"), model_kwargs=dict(depths=SMALL["depths"]), crop_pct=0.9, gp="max")
    options = "--model-kwargs act_layer=silu --mean 0.1 0.2 0.3 --std 0.5 --crop-pct 1 --interpolation nearest --gp avg"
    assert main(["convert", str(path), "--out", str(out), *options.split()]) == 0
    assert_same(model, out)
    cfg = json.loads((out / "config.json").read_text())["pretrained_cfg"]
    assert (cfg["mean"], cfg["std"]) == ([0.1, 0.2, 0.3], [0.5, 0.5, 0.5])
    assert (cfg["crop_pct"], cfg["interpolation"]) == (1.0, "nearest")
    assert "gp" not in cfg and "global_pool: avg (as given)" in capsys.readouterr().out


def test_a_plain_state_dict_needs_options_and_says_what_is_assumed(path, out, capsys):
    model = small(img_size=(64, 96), in_chans=1).eval()
    torch.save(model.state_dict(), path)
    assert "does not say which model it is of; give --model" in fail(capsys, path, "--out", out)
    assert "if it was built with arguments of its own, give them by --model-kwargs" in fail(
        capsys, path, "--out", out, "--model", "cmt_ti"
    )
    assert main(["convert", str(path), "--out", str(out), "--model", "cmt_ti", "--model-kwargs", "depths=1,1,2,1"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["num_classes"] == 10 and config["pretrained_cfg"]["input_size"] == [1, 64, 96]
    assert "10 classes at 64 x 96" in ModelCard.load(out / "README.md").text
    printed = capsys.readouterr().out
    assert "crop_pct: 0.875 (assumed, the model's default)" in printed and "label_names: unknown" in printed
    assert "mean: 0.449 (assumed, the model's default, averaged)" in printed
    state = load_file(out / "model.safetensors")
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_the_safetensors_of_a_wrapped_model_are_its_own(prefix, path, out):
    model, path = small().eval(), path.with_name("wrapped.safetensors")
    save_file({prefix + key: value for key, value in model.state_dict().items()}, path)
    assert main(["convert", str(path), "--out", str(out), "--model", "cmt_ti", "--model-kwargs", "depths=1,1,2,1"]) == 0
    assert_same(model, out)


def test_model_kwargs_go_before_the_checkpoint_s_size_and_pooling(path, out):
    save(path, small(), img_size=64, gp="avg", model_kwargs=dict(depths=SMALL["depths"]))
    assert main(["convert", str(path), "--out", str(out), "--model-kwargs", "img_size=96", "global_pool=max"]) == 0
    model = loaded(out)
    assert model.pretrained_cfg["input_size"] == (3, 96, 96) and model.global_pool.pool_type == "max"


def test_a_folder_whose_name_timm_takes_for_an_address_is_refused_or_loads(path, tmp_path, capsys):
    model, out = save(path, small(), model_kwargs=SMALL), tmp_path / "C# work" / "mine"
    if main(["convert", str(path), "--out", str(out)]) == 0:
        assert_same(model, out)
    else:
        assert f"cannot load from {out}; name another folder, or update timm" in capsys.readouterr().err


def test_catavgmax_pooling_is_seen_in_the_weights(path, out):
    model = save(path, small(global_pool="catavgmax"))
    options = ["--model", "cmt_ti", "--model-kwargs", "depths=1,1,2,1"]
    assert main(["convert", str(path), "--out", str(out), *options]) == 0
    assert_same(model, out)


def test_a_size_that_train_py_was_told_for_its_images_alone_is_kept(path, out):
    """Not every version of timm's scripts builds the model at --img-size."""
    model = save(path, small(img_size=160), img_size=64, model_kwargs=dict(depths=SMALL["depths"]))
    assert main(["convert", str(path), "--out", str(out)]) == 0
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(out)(x), model(x))
    assert timm.data.resolve_data_config(model=loaded(out))["input_size"] == (3, 64, 64)


def test_the_averaged_weights_are_preferred(path, out, capsys):
    ema = ModelEmaV3(small())
    save(path, small(), ema=ema, model_kwargs=SMALL)
    assert main(["convert", str(path), "--out", str(out)]) == 0
    assert_same(ema.module.eval(), out)
    assert "weights: state_dict_ema, averaged" in capsys.readouterr().out


def test_a_model_trained_from_a_folder_has_the_folder_s_configuration(path, out, tmp_path):
    first = tmp_path / "first"
    kwargs = dict(depths=SMALL["depths"], act_layer="silu")
    save(path, small(act_layer="silu", global_pool="max"), model_kwargs=kwargs, gp="max", mean=[0.1], std=[0.2])
    (tmp_path / "names.txt").write_text("\n".join("abcdefghij"))
    assert main(["convert", str(path), "--out", str(first), "--labels", str(tmp_path / "names.txt")]) == 0
    model = timm.create_model(f"local-dir:{first}", pretrained=True, num_classes=3)
    save(path, model, model=f"local-dir:{first}", num_classes=3)
    assert main(["convert", str(path), "--out", str(out)]) == 0
    assert_same(model, out)
    assert timm.data.resolve_data_config(model=loaded(out))["mean"] == [0.1, 0.1, 0.1]
    assert "label_names" not in (out / "config.json").read_text()


# ---- the names of the classes


@pytest.fixture
def folders(tmp_path):
    """An ImageFolder of ten classes, which a plain sort has in another order."""
    from PIL import Image

    for i in range(10):
        (tmp_path / "data" / "train" / f"class {i + 1}").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / "train" / f"class {i + 1}" / "a.png")
    return tmp_path / "data"


@pytest.mark.parametrize("source", ["args", "--data-dir", "--labels"])
def test_class_names_are_kept_in_the_order_of_the_classes(source, folders, path, out, tmp_path):
    names = [f"class {i + 1}" for i in range(10)]
    args = dict(data_dir=str(folders)) if source == "args" else {}
    save(path, small(), model_kwargs=SMALL, **args)
    file = tmp_path / "names.txt"
    file.write_text("\n".join(names) + "\n")
    options = {"args": [], "--data-dir": ["--data-dir", str(folders)], "--labels": ["--labels", str(file)]}[source]
    assert main(["convert", str(path), "--out", str(out), *options]) == 0
    assert json.loads((out / "config.json").read_text())["label_names"] == names
    assert list(loaded(out).pretrained_cfg["label_names"]) == names


@pytest.mark.parametrize(
    "dataset, names",
    [
        ("", ["Abyssinian", "american_bulldog", "beagle", "Bengal"]),
        ("torch/image_folder", ["Abyssinian", "Bengal", "american_bulldog", "beagle"]),
    ],
)
def test_class_folders_have_the_order_of_the_reader_that_it_was_trained_with(dataset, names, path, out, tmp_path):
    from PIL import Image

    for name in names:
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / "train" / name / "a.png")
    save(path, small(num_classes=4), model_kwargs=SMALL, dataset=dataset)
    assert main(["convert", str(path), "--out", str(out), "--data-dir", str(tmp_path / "data")]) == 0
    assert json.loads((out / "config.json").read_text())["label_names"] == names


def test_class_folders_that_a_class_map_joins_name_no_classes(folders, path, out, tmp_path, capsys):
    class_map = {f"class {i + 1}": i or 1 for i in range(10)}  # the first two are one class, and class 0 is none
    (tmp_path / "map.pkl").write_bytes(pickle.dumps(class_map))
    save(path, small(), model_kwargs=SMALL, data_dir=str(folders), class_map=str(tmp_path / "map.pkl"))
    assert main(["convert", str(path), "--out", str(out)]) == 0
    assert f"label_names: unknown: {folders} has 9 classes; --labels FILE gives them" in capsys.readouterr().out
    assert "label_names" not in json.loads((out / "config.json").read_text())


def test_a_data_set_of_another_kind_is_not_said_to_have_folders(path, out, capsys):
    save(path, small(), model_kwargs=SMALL, dataset="hfds/pets")
    assert main(["convert", str(path), "--out", str(out)]) == 0
    assert "label_names: unknown; --labels FILE gives them" in capsys.readouterr().out


def test_class_names_that_are_too_few_are_refused(folders, path, out, capsys, tmp_path):
    save(path, small(num_classes=11), model_kwargs=dict(depths=SMALL["depths"]))
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    options = [path, "--out", out, "--model", "cmt_ti"]
    assert "names.txt has 2 lines, and the model 11 classes" in fail(
        capsys, *options, "--labels", tmp_path / "names.txt"
    )
    assert "data has 10 classes, and the model 11; give --labels" in fail(capsys, *options, "--data-dir", folders)
    assert "none.txt cannot be read" in fail(capsys, *options, "--labels", "none.txt")
    assert "no class folders with images" in fail(capsys, *options, "--data-dir", tmp_path / "none")


# ---- how it writes


def test_the_weights_may_be_read_by_whom_the_umask_lets(path, out):
    save(path, small(), model_kwargs=SMALL)
    umask = os.umask(0o027)
    try:
        assert main(["convert", str(path), "--out", str(out)]) == 0
    finally:
        os.umask(umask)
    assert {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {0o640}
    assert stat.S_IMODE(out.stat().st_mode) == 0o750


def test_a_signal_to_end_leaves_nothing(path, out, tmp_path, monkeypatch):
    save(path, small(), model_kwargs=SMALL)
    monkeypatch.setattr(convert, "save_file", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        main(["convert", str(path), "--out", str(out)])
    assert end.value.code == 143 and list(tmp_path.iterdir()) == [path]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_another_process_that_writes_the_same_folder_first_wins(path, out, tmp_path, monkeypatch, capsys):
    save(path, small(), model_kwargs=SMALL)
    save_file = convert.save_file

    def save_while_another_does(*args, **kwargs):
        save_file(*args, **kwargs)
        out.mkdir()
        (out / "theirs").touch()

    monkeypatch.setattr(convert, "save_file", save_while_another_does)
    assert "is there already; name another folder, or remove it" in fail(capsys, path, "--out", out)
    assert {file.name for file in tmp_path.iterdir()} == {"last.pth.tar", "out"}


def test_convert_does_not_overwrite(tmp_path, capsys):
    assert "is there already" in fail(capsys, "--model", "cmt_ti", "--out", tmp_path)


# ---- what it refuses


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no checkpoint at"),
        (b"<!DOCTYPE html>\n<html>", "is no checkpoint: it begins with '<!DOCTYPE html>'"),
        ("cmt_xs", "is of cmt_xs, not of cmt_ti; give --model cmt_xs"),
        ("resnet18", "is not of a CMT"),
        ("folded", "is of a reparameterized model; convert the checkpoint that this one was made from"),
    ],
)
def test_convert_refuses_what_is_no_checkpoint_of_the_model(content, message, path, out, tmp_path, capsys):
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folded":
        torch.save(reparameterize_model(timm.create_model("cmt_ti").eval()).state_dict(), path)
    elif content:
        torch.save(timm.create_model(content).state_dict(), path)
    assert message in fail(capsys, path, "--model", "cmt_ti", "--out", out)
    assert {file.name for file in tmp_path.iterdir()} <= {path.name}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model-kwargs colour=red", "unexpected keyword argument 'colour'); check --model-kwargs and --gp"),
        ("--num-classes 7", "--num-classes 7 does not fit"),
        ("--mean 0.5 0.5", "--mean has 2 numbers for images of 3 channels"),
        ("--gp median", "Invalid pool type: median); check"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, path, out, capsys):
    save(path, small(), model_kwargs=SMALL)
    assert message in fail(capsys, path, "--out", out, *options.split())


def test_a_checkpoint_of_another_network_by_train_py_is_named(path, out, capsys):
    save(path, timm.create_model("resnet18"), model="resnet18")
    assert "is of resnet18, which is no CMT" in fail(capsys, path, "--out", out)


def test_a_checkpoint_trained_from_a_folder_that_is_gone_is_said_so(path, out, capsys):
    save(path, small(), model="local-dir:gone")
    assert "was trained from local-dir:gone, which cannot be read" in fail(capsys, path, "--out", out)
