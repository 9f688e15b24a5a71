"""The types that the package ships hold in a user's program, as mypy sees them from the installed wheel."""

import importlib.util
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

if importlib.util.find_spec("mypy") is None:
    pytest.skip("NOT TESTED: the types; pip install mypy", allow_module_level=True)

PROGRAM = """
import torch

from timm_cmt import CMT, resize_rel_pos_bias
from timm_cmt.detection import retinanet

model: CMT = CMT(img_size=(64, 96), num_classes=10, recompute_act=True)
model.set_input_size(96)
features: torch.Tensor = model.forward_features(torch.zeros(1, 3, 96, 96))
bias: torch.Tensor = resize_rel_pos_bias(torch.zeros(1, 4, 4), (2, 2), (2, 2), (3, 3), (3, 3))
logits = model(torch.zeros(1, 3, 96, 96))
detector = retinanet("cmt_ti", num_classes=3, min_size=[64, 96])
"""


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> str:
    """The interpreter of an environment that has the wheel, and torch and timm from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (site,) = folder.rglob("site-packages")
    (site / "these.pth").write_text(sysconfig.get_path("purelib"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    return str(next((folder / "bin").glob("python3")))


def test_a_program_that_is_right_passes_and_one_that_is_wrong_does_not(python, tmp_path):
    (tmp_path / "right.py").write_text(PROGRAM)
    (tmp_path / "wrong.py").write_text(PROGRAM.replace("num_classes=10", 'num_classes="ten"'))
    root = Path(__file__).parents[2]  # with its options, mypy has torch's types already where it has run there before
    options = ["--config-file", str(root / "pyproject.toml"), "--cache-dir", str(root / ".mypy_cache")]
    options += ["--python-executable", python, "--no-error-summary"]
    command = [sys.executable, "-m", "mypy", *options, "right.py", "wrong.py"]  # in one run, since torch is large
    (error,) = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout.splitlines()
    assert error.startswith("wrong.py:7: error:") and '"num_classes" to "CMT" has incompatible type "str"' in error
