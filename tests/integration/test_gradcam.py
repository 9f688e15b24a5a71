"""Grad-CAM through the grad-cam package, on the last stage."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

GradCAM = pytest.importorskip(
    "pytorch_grad_cam",
    reason="NOT TESTED: Grad-CAM; pip install grad-cam and run pytest tests/integration/test_gradcam.py",
).GradCAM

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # more wait for each other where the cores are busy


@pytest.fixture(scope="module")
def maps() -> np.ndarray:
    """[3, 70, 130], the maps of three classes for one image of noise, by a model built for another size."""
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    torch.manual_seed(0)
    model = timm.create_model("cmt_ti", img_size=96, num_classes=3)
    with torch.no_grad():  # what speaks for class 0 speaks against class 1
        model.head.weight[1] = -model.head.weight[0]
    images = torch.randn(1, 3, 70, 130).expand(3, -1, -1, -1)
    with GradCAM(model, target_layers=[model.stages[-1]]) as cam:
        return cam(images, targets=[ClassifierOutputTarget(label) for label in range(3)])


def test_the_map_has_the_image_s_size(maps):
    assert maps.shape == (3, 70, 130)


def test_the_map_is_not_zero(maps):
    assert np.isfinite(maps).all() and maps.min() >= 0
    assert (maps.max(axis=(1, 2)) > 0.9).all()


def test_the_map_is_of_the_class(maps):
    first, opposite, other = (heat.ravel() for heat in maps)
    assert np.corrcoef(first, opposite)[0, 1] < 0
    assert abs(first - other).mean() > 0.05


def test_explaining_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = timm.create_model("cmt_ti", img_size=64, num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    before = model(x)
    with GradCAM(model, target_layers=[model.stages[-1]]) as cam:
        cam(x, targets=None)
    assert torch.equal(model(x), before)
    assert not model.stages[-1]._forward_hooks


def test_the_example_s_maps_lie_on_the_objects(tmp_path):
    """A model that was told what is in crops of photographs, and never where, explains each tag by its object."""
    pytest.importorskip(
        "skimage", reason="NOT TESTED: benchmarks/examples/explain.py; pip install scikit-image and run this file"
    )
    script = Path(__file__).parents[2] / "benchmarks" / "examples" / "explain.py"
    command = [sys.executable, script, "--out", "map.png", "--steps", "80"]  # the page's picture: 120 of them
    done = subprocess.run(command, cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(\w+) [\d.]+: (\d+)% of its map in its box, which is (\d+)%", done.stdout, re.M)
    assert [name for name, *_ in found] == ["person", "flag", "rocket", "helmet"]
    for name, share, area in found[1:]:  # a person fills most of the picture
        assert int(share) > 1.5 * int(area), f"{name}: {done.stdout}"
    assert Image.open(tmp_path / "map.png").width > 1000
    assert [file.name for file in tmp_path.iterdir()] == ["map.png"]
