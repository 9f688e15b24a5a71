"""What .ci/run asks of a package that was installed from the wheel or the sdist: its models, its data files."""

import sys
from importlib.resources import files

import timm

import timm_cmt
from timm_cmt.cli.cards import make_card

assert timm_cmt.__file__.startswith(sys.prefix), timm_cmt.__file__
assert sorted(timm.list_models("cmt*")) == ["cmt_b", "cmt_l", "cmt_s", "cmt_ti", "cmt_xs"]
package = files("timm_cmt")
recipes = [f"recipes/{model}.yaml" for model in timm.list_models("cmt*")]
for name in ("hub.json", "py.typed", "cli/model_card.md", *recipes):
    assert package.joinpath(name).is_file(), name
assert "license: mit" in make_card("cmt_ti")
print(f"{timm_cmt.__file__}: the models and data files are there")
