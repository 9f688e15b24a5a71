"""The recipes against the parser of timm's train.py, which is not on PyPI: TIMM_SRC names a clone of timm."""

import argparse
import importlib.util
import os
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from timm_cmt.cli.recipe import find_recipe, is_for_torchvision, list_recipes, make_command

TIMM_SRC = os.environ.get("TIMM_SRC")
pytestmark = pytest.mark.skipif(
    not TIMM_SRC,
    reason="NOT TESTED: the recipes against train.py's own parser. Clone timm and run "
    "TIMM_SRC=path/to/the/clone pytest tests/integration/test_recipe_arguments.py",
)
RECIPES = [name for name in list_recipes() if not is_for_torchvision(name)]


def read(name: str) -> dict:
    return yaml.safe_load(find_recipe(name).read_text())


@pytest.fixture(scope="module")
def train_py():
    """timm's train.py as a module."""
    spec = importlib.util.spec_from_file_location("timm_train", Path(TIMM_SRC) / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def parse(train_py, monkeypatch):
    """Parses a command line as train.py does; the defaults that a file sets go again."""
    defaults = {action.dest: action.default for action in train_py.parser._actions}
    monkeypatch.setattr(train_py.parser, "_defaults", dict(train_py.parser._defaults))

    def parse(*arguments: str) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        return train_py._parse_args()[0]

    yield parse
    for action in train_py.parser._actions:
        action.default = defaults[action.dest]


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_is_an_argument_of_train_py_and_every_value_one_that_it_takes(name, train_py):
    actions = {action.dest: action for action in train_py.parser._actions}
    recipe = read(name)
    assert recipe.keys() <= actions.keys()
    for key, value in recipe.items():
        if actions[key].nargs == 0:  # a switch
            assert isinstance(value, bool), key
        else:
            assert value == (actions[key].type or str)(value) and not isinstance(value, bool), key
            assert actions[key].choices is None or value in actions[key].choices, key


@pytest.mark.parametrize("name", RECIPES)
def test_every_value_reaches_train_py_s_arguments(name, parse):
    recipe = read(name)
    args = vars(parse("-c", str(find_recipe(name))))
    assert {key: args[key] for key in recipe} == recipe
    assert args["lr"] is None  # so that lr_base counts


@pytest.mark.parametrize("gpus", [1, 2])
def test_the_printed_command_parses_and_changes_the_recipe_in_nothing_else(gpus, parse):
    words = shlex.split(make_command("cmt_s", batch_size=64, gpus=gpus).partition(" train.py ")[2])
    plain = vars(parse("-c", str(find_recipe("cmt_s"))))
    args = vars(parse(*words))
    expected = dict(batch_size=64, lr=5e-4 * 64 * gpus / 512, data_dir="DIR")
    expected |= dict(aug_repeats=0) if gpus == 1 else {}
    assert {key: value for key, value in args.items() if value != plain[key]} == expected
