"""Training recipes, YAML files, as ``timm-cmt recipe`` prints them.

One file per ImageNet model and per data set of the paper's transfer experiments, which timm's train.py takes with
``-c``; and one per detector and schedule on COCO, for torchvision's train.py, which takes arguments alone. Each says
which of its numbers are the authors'.
"""

import os
import shlex
import subprocess
from importlib.resources import files
from pathlib import Path

import yaml

__all__ = ["find_recipe", "is_for_torchvision", "join", "list_recipes", "make_command"]

join = subprocess.list2cmdline if os.name == "nt" else shlex.join  # words of a command for the user's shell
RECIPES = files("timm_cmt").joinpath("recipes")


def list_recipes() -> list[str]:
    """The names of the recipes, in alphabetical order."""
    suffix = ".yaml"
    return sorted(file.name.removesuffix(suffix) for file in RECIPES.iterdir() if file.name.endswith(suffix))


def find_recipe(name: str | None) -> Path:
    """The file of a recipe.

    Raises:
        ValueError: No name is given, or there is no such recipe.
        RuntimeError: The package is not unpacked, so that there is no file that train.py could read.
    """
    names = list_recipes()
    if name not in names:
        problem = "no recipe is named" if name is None else f"there is no recipe {name}"
        raise ValueError(f"{problem}; choose one of {', '.join(names)}")
    if not isinstance(RECIPES, Path):
        raise RuntimeError(f"{RECIPES} is inside an archive, where train.py cannot read it; unpack the archive first")
    return RECIPES / f"{name}.yaml"


def is_for_torchvision(name: str | None) -> bool:
    """Is it a recipe for torchvision's train.py, and no file for timm's?"""
    return name is not None and name.startswith("coco-")


def make_command(name: str, batch_size: int | None = None, gpus: int = 1, data_dir: str = "DIR") -> str:
    """The train.py command of a recipe for one machine, with the learning rate of its global batch.

    That rate is the one which timm's train.py itself finds by the recipe's ``lr_base``; it is printed so that it can be
    seen. In front of a command for torchvision's stands what the recipe's file says of its numbers, as comments.

    Args:
        name: The recipe.
        batch_size: Images on each GPU; the recipe's own if None.
        gpus: Processes, one GPU each.
        data_dir: The data set's folder.

    Raises:
        ValueError: There is no such recipe, or it does not work with such a batch.
    """
    path = find_recipe(name)
    text = path.read_text(encoding="utf-8")
    recipe = yaml.safe_load(text)
    if batch_size is None:
        batch_size = recipe["batch_size"]
    launcher = "python" if gpus == 1 else f"torchrun --standalone --nproc-per-node={gpus}"
    if is_for_torchvision(name):
        recipe["lr"] = f"{recipe.pop('lr_base') * batch_size * gpus / recipe.pop('lr_base_size'):g}"
        options = ["--data-path", data_dir]
        for key, value in {**recipe, "batch_size": batch_size}.items():
            options += [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
        comment = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
        return f"{comment}{launcher} train.py {join(options)}"
    if batch_size % 2:
        raise ValueError(f"--batch-size {batch_size} is odd, but mixup takes the images in pairs; give an even number")
    lr = recipe["lr_base"] * batch_size * gpus / recipe["lr_base_size"]
    if lr <= recipe["min_lr"]:
        raise ValueError(
            f"--batch-size {batch_size} and --gpus {gpus} give a learning rate of {lr:g}, not above the recipe's "
            f"lowest, {recipe['min_lr']:g}; give more images or GPUs"
        )
    options = ["-c", str(path), "--data-dir", data_dir, "--batch-size", str(batch_size), "--lr", f"{lr:g}"]
    if gpus == 1 and "aug_repeats" in recipe:  # train.py repeats augmentations in many processes only
        options += ["--aug-repeats", "0"]
    return f"{launcher} train.py {join(options)}"
