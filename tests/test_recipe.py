"""The recipes: the authors' numbers, in keys that train.py knows, and a command with the right learning rate."""

import argparse
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from common import SIZES
from timm.data import create_dataset
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

import timm_cmt
from timm_cmt.cli import main
from timm_cmt.cli.recipe import find_recipe, list_recipes, make_command

SETS = ["cars", "cifar10", "cifar100", "flowers102", "pets"]
TRANSFER = [f"{model}-{name}" for model in ("cmt_b", "cmt_s") for name in SETS]
IMAGENET = ["cmt_b", "cmt_l", "cmt_s", "cmt_ti", "cmt_xs"]
COCO = [f"coco-{detector}-{schedule}" for detector in ("maskrcnn", "retinanet") for schedule in ("1x", "3x")]
ALL = list_recipes()
RECIPES = [name for name in ALL if name not in COCO]  # for timm's train.py
# train.py takes any key of a file without a word, one that it does not know as well. So the keys are written out here;
# tests/integration checks them against train.py's own parser.
IMAGENET_KEYS = set(
    "model epochs warmup_epochs cooldown_epochs batch_size opt opt_eps weight_decay sched lr_base lr_base_size "
    "lr_base_scale min_lr warmup_lr drop drop_path aa color_jitter train_interpolation mixup cutmix smoothing reprob "
    "remode recount aug_repeats amp model_ema model_ema_decay".split()
)
WORDS = {"model", "opt", "sched", "lr_base_scale", "aa", "train_interpolation", "remode", "dataset"}


def read(name: str) -> dict:
    return yaml.safe_load(find_recipe(name).read_text())


def test_there_is_a_recipe_for_every_model_and_transfer_set_of_the_paper():
    assert {*IMAGENET, *TRANSFER, *COCO} == set(ALL)


@pytest.mark.parametrize("name", RECIPES)
def test_keys_are_those_of_train_py(name):
    optional = {"model_ema_decay"} if name == "cmt_ti" else set()
    if name in TRANSFER:
        keys = IMAGENET_KEYS - {"aug_repeats", "model_ema", "model_ema_decay"} | {"pretrained", "num_classes"}
        optional = {"dataset", "img_size"}
    else:
        keys = IMAGENET_KEYS
    assert keys - optional <= read(name).keys() <= keys | optional


@pytest.mark.parametrize("name", RECIPES)
def test_numbers_are_numbers(name):
    # YAML reads 5e-4 as a word, 5.0e-4 as a number.
    assert {key for key, value in read(name).items() if isinstance(value, str)} <= WORDS


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "lr", "weight_decay", "drop_path", "drop", "min_lr", "warmup_lr", "ema"),
    [
        ("cmt_ti", 800, 256, 8e-4, 0.05, 0.1, 0.1, 1e-5, 1e-7, None),
        ("cmt_xs", 400, 256, 7e-4, 0.04, 0.08, 0.1, 2e-5, 1e-6, 0.9998),
        ("cmt_s", 300, 128, 5e-4, 0.05, 0.1, 0.1, 1e-5, 1e-7, 0.99996),
        ("cmt_b", 300, 64, 5e-4, 0.05, 0.25, 0.3, 2e-5, 1e-6, 0.99996),
        ("cmt_l", 300, 64, 5e-4, 0.05, 0.25, 0.3, 2e-5, 1e-6, 0.99996),
    ],
)
def test_imagenet_recipes_are_the_authors(
    name, epochs, batch, lr, weight_decay, drop_path, drop, min_lr, warmup_lr, ema
):
    given = dict(
        model=name,
        epochs=epochs,
        batch_size=batch,
        lr_base=lr,
        weight_decay=weight_decay,
        drop_path=drop_path,
        drop=drop,
        min_lr=min_lr,
        warmup_lr=warmup_lr,
        model_ema=ema is not None,
        **(dict(model_ema_decay=ema) if ema else {}),
    )
    common = dict(
        warmup_epochs=20,
        cooldown_epochs=10,
        opt="adamw",
        opt_eps=1e-8,
        sched="cosine",
        lr_base_size=512,
        lr_base_scale="linear",
        aa="rand-m9-mstd0.5-inc1",
        color_jitter=0.4,
        train_interpolation="bicubic",
        mixup=0.8,
        cutmix=1.0,
        smoothing=0.1,
        reprob=0.25,
        remode="pixel",
        recount=1,
        aug_repeats=3,
        amp=True,
    )
    assert read(name) == given | common


@pytest.mark.parametrize("model", ["cmt_s", "cmt_b"])
@pytest.mark.parametrize(
    ("name", "epochs", "lr", "classes"),
    [
        ("cifar10", 150, 6e-5, 10),
        ("cifar100", 150, 6e-5, 100),
        ("flowers102", 300, 9e-5, 102),
        ("pets", 300, 6e-5, 37),
        ("cars", 500, 9e-5, 196),
    ],
)
def test_transfer_recipes_are_the_authors_and_the_rest_is_as_on_imagenet(model, name, epochs, lr, classes):
    recipe, imagenet = read(f"{model}-{name}"), read(model)
    own = {"epochs", "lr_base", "num_classes", "pretrained", "dataset", "batch_size", "min_lr", "img_size"}
    assert recipe.get("img_size", SIZES[model]) == 224
    assert (recipe["epochs"], recipe["lr_base"], recipe["num_classes"]) == (epochs, lr, classes)
    assert recipe["pretrained"] is True
    assert {key: value for key, value in recipe.items() if key not in own} == {
        key: imagenet[key] for key in recipe if key not in own
    }
    # On the authors' 8 GPUs the rate is the printed one, whether their linear rule is meant to apply or not.
    assert recipe["lr_base"] * recipe["batch_size"] * 8 / recipe["lr_base_size"] == lr


@pytest.mark.parametrize(
    ("name", "epochs", "steps", "detector", "result"),
    [
        ("coco-retinanet-1x", 12, [8, 11], "retinanet_cmt_s_fpn", "boxes 44.3."),
        ("coco-retinanet-3x", 36, [27, 33], "retinanet_cmt_s_fpn_ms", "boxes 46.9."),
        ("coco-maskrcnn-1x", 12, [8, 11], "maskrcnn_cmt_s_fpn", "boxes 44.6, masks 40.7."),
        ("coco-maskrcnn-3x", 36, [27, 33], "maskrcnn_cmt_s_fpn_ms", "boxes 48.3, masks 43.7."),
    ],
)
def test_detection_recipes_are_the_paper_s_and_pvt_s(name, epochs, steps, detector, result):
    assert read(name) == dict(
        dataset="coco",
        model=detector,
        weights_backbone="in1k",
        trainable_backbone_layers=5,
        epochs=epochs,
        batch_size=2,
        opt="adamw",
        lr_base=1e-4,
        lr_base_size=16,
        weight_decay=1e-4,
        lr_scheduler="multisteplr",
        lr_steps=steps,
        lr_gamma=0.1,
        data_augmentation="hflip",
        aspect_ratio_group_factor=3,
    )
    assert f"The paper's mAP, not measured here: {result}" in find_recipe(name).read_text()


@pytest.mark.parametrize("name", ALL)
def test_every_file_says_whose_its_numbers_are(name):
    comment = "".join(line for line in find_recipe(name).read_text().splitlines() if line.startswith("#"))
    assert all(word in comment for word in (["paper's", "PVT's", "Ours"] if name in COCO else ["authors"]))


@pytest.mark.parametrize("name", RECIPES)
def test_timm_s_schedule_warms_up_and_ends_at_the_lowest_rate(name):
    recipe = read(name)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(argparse.Namespace(**recipe)))
    assert epochs == recipe["epochs"] + 10

    def rate(epoch: int) -> float:
        scheduler.step(epoch)
        return optimizer.param_groups[0]["lr"]

    assert rate(0) == recipe["warmup_lr"]
    assert rate(10) == pytest.approx(0.5, abs=1e-4)
    assert max(range(epochs), key=rate) == 20
    assert rate(epochs - 10) == rate(epochs - 1) == recipe["min_lr"]


@pytest.mark.parametrize("name", [name for name in TRANSFER if "cifar" in name])
def test_timm_knows_the_data_sets_that_are_named(name, tmp_path):
    with pytest.raises(RuntimeError, match="download=True"):  # torchvision's class, in an empty folder
        create_dataset(read(name)["dataset"], root=str(tmp_path), split="train", is_training=True)


# ---- the command


def test_from_a_zip_the_recipes_are_listed_and_what_cannot_work_is_said(tmp_path):
    package = Path(timm_cmt.__file__).parent
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as file:
        for path in package.rglob("*"):
            if path.suffix in (".py", ".yaml", ".json", ".md"):
                file.write(path, Path("timm_cmt") / path.relative_to(package))
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / "package.zip")!r})
from timm_cmt.cli import main
from timm_cmt.cli.recipe import list_recipes
print(*list_recipes())
sys.exit(main(["recipe", "cmt_s"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ALL
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "unpack the archive first" in done.stderr


def test_recipe_prints_the_path(capsys):
    assert main(["recipe", "cmt_s"]) == 0
    path = Path(capsys.readouterr().out.rstrip("\n"))
    assert path.is_file() and yaml.safe_load(path.read_text())["model"] == "cmt_s"


@pytest.mark.parametrize(
    ("name", "options", "launcher", "batch", "lr"),
    [
        ("cmt_s", ["--batch-size", "64", "--gpus", "2"], "torchrun --standalone --nproc-per-node=2", "64", 1.25e-4),
        ("cmt_s", ["--gpus", "8"], "torchrun --standalone --nproc-per-node=8", "128", 1e-3),
        ("cmt_ti", ["--batch-size", "32"], "python", "32", 5e-5),
        ("cmt_s-pets", ["--data-dir", "/my pets"], "python", "64", 7.5e-6),
    ],
)
def test_the_command_has_the_rate_of_its_global_batch(name, options, launcher, batch, lr, capsys):
    assert main(["recipe", name, *options]) == 0
    command, script, arguments = capsys.readouterr().out.partition(" train.py ")
    assert command == launcher and script
    words = shlex.split(arguments)
    given = dict(zip(words[::2], words[1::2]))
    assert given["-c"] == str(find_recipe(name)) and given["--batch-size"] == batch
    assert float(given["--lr"]) == pytest.approx(lr, rel=1e-5)
    assert given["--data-dir"] == ("/my pets" if "/my pets" in options else "DIR")


@pytest.mark.parametrize(
    ("options", "launcher", "batch", "lr"),
    [([], "python", "2", 1.25e-5), (["--gpus", "4", "--batch-size", "1", "--data-dir", "/my coco"], "4", "1", 2.5e-5)],
)
def test_the_command_on_coco_is_whole_with_the_comment_and_the_rate_of_its_images(options, launcher, batch, lr, capsys):
    assert main(["recipe", "coco-maskrcnn-3x", *options]) == 0
    *comment, command = capsys.readouterr().out.splitlines()
    assert comment and all(line.startswith("#") for line in comment)
    start, script, arguments = command.partition(" train.py ")
    assert start == ("python" if launcher == "python" else f"torchrun --standalone --nproc-per-node={launcher}")
    assert script and f"--batch-size {batch} " in arguments and "--lr-steps 27 33 " in arguments
    assert shlex.split(arguments)[:2] == ["--data-path", "/my coco" if options else "DIR"]
    assert float(shlex.split(arguments)[-1]) == lr and "lr-base" not in arguments


def test_one_process_repeats_no_augmentation_since_train_py_refuses_it():
    assert "--aug-repeats 0" in make_command("cmt_s", gpus=1)
    assert "--aug-repeats" not in make_command("cmt_s", gpus=2)
    assert "--aug-repeats" not in make_command("cmt_s-cars", gpus=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no recipe is named; choose one of cmt_b, cmt_b-cars"),
        (["cmt_m"], "there is no recipe cmt_m; choose one of cmt_b, cmt_b-cars"),
        (["cmt_s", "--batch-size", "0"], "0 is no number of images; give 1 or more"),
        (["cmt_s", "--gpus", "two"], "two is no number of GPUs; give 1 or more"),
        (["cmt_s", "--batch-size", "63"], "--batch-size 63 is odd"),
        (["cmt_xs", "--batch-size", "8"], "a learning rate of 1.09375e-05, not above the recipe's lowest, 2e-05"),
    ],
)
def test_a_bad_value_is_one_line_and_a_non_zero_exit(arguments, message, capsys):
    try:
        status = main(["recipe", *arguments])
    except SystemExit as end:  # argparse's own errors
        status = end.code
    error = capsys.readouterr().err
    assert status not in (0, None) and message in error and error.count("\n") == 1, error
