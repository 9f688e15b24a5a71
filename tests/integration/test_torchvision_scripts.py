"""torchvision's train.py for detection, unmodified, from a clone of torchvision: TORCHVISION_SRC names the clone.

Its scripts are not on PyPI. The photographs and what is drawn on them are those of benchmarks/examples.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from timm_cmt.cli.recipe import make_command

TORCHVISION_SRC = os.environ.get("TORCHVISION_SRC")
COMMAND = (
    "clone torchvision, pip install pycocotools scikit-image scikit-learn, and run "
    "TORCHVISION_SRC=path/to/the/clone pytest tests/integration/test_torchvision_scripts.py"
)
pytestmark = pytest.mark.skipif(
    not TORCHVISION_SRC, reason=f"NOT TESTED: torchvision's train.py. To test it, {COMMAND}"
)
EXAMPLES = Path(__file__).parents[2] / "benchmarks" / "examples"
BODY = "backbone.body."
AP = r"Average Precision  \(AP\) @\[ IoU=0.50:0.95 \| area=   all \| maxDets=100 \] = (-?[\d.]+)"


def run(*arguments: str | Path, cwd: Path, small: bool = True, processes: int = 1) -> str:
    """Run train.py as it is, or on small images by cpu_detection.py; returns what it printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    helper = [Path(__file__).with_name("cpu_detection.py")] if small else []
    script = Path(TORCHVISION_SRC) / "references" / "detection" / "train.py"
    done = subprocess.run(
        [str(part) for part in (sys.executable, *launcher, *helper, script, "--device", "cpu", "-j", "0", *arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


def read_tables(output: str) -> list[float]:
    """The mAP of each of pycocotools' tables."""
    assert output.count("maxDets=100") == 10 * len(re.findall(AP, output))
    return [float(ap) for ap in re.findall(AP, output)]


def write_coco(folder: Path, files: tuple[str, ...] = ()) -> Path:
    """The photographs, or these of them, as COCO 2017 lies on the disk, for training and for the test."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        from photographs import make_coco, open_photograph
    finally:
        sys.path.remove(str(EXAMPLES))
    coco = make_coco()
    coco["images"] = [image for image in coco["images"] if not files or image["file_name"] in files]
    ids = {image["id"] for image in coco["images"]}
    coco["annotations"] = [annotation for annotation in coco["annotations"] if annotation["image_id"] in ids]
    (folder / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (folder / split).mkdir()
        for image in coco["images"]:
            open_photograph(image["file_name"]).save(folder / split / image["file_name"])
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    for package in ("pycocotools", "skimage", "sklearn"):
        pytest.importorskip(package, reason=f"NOT TESTED: torchvision's train.py. To test it, {COMMAND}")
    return write_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A folder with a CMT-Ti for --weights-backbone; its BatchNorms have statistics that training would change."""
    folder = tmp_path_factory.mktemp("weights")
    model = timm.create_model("cmt_ti", img_size=64)
    model.train()(torch.randn(4, 3, 64, 64))
    timm.models.save_for_hf(model, folder)
    return folder


def test_train_py_alone_trains_and_tests_at_the_paper_s_size(coco, tmp_path):
    data = write_coco(tmp_path / "coco", ("chelsea.png",))
    options = shlex.split(
        make_command("coco-retinanet-1x", batch_size=1, data_dir=str(data)).partition(" train.py ")[2]
    )
    for name, value in {"--model": "retinanet_cmt_ti_fpn", "--epochs": "1"}.items():
        options[options.index(name) + 1] = value
    at = options.index("--weights-backbone")  # those are to be downloaded
    del options[at : at + 4]  # with the layers to train, which without weights are all
    output = run(*options, "--output-dir", "out", cwd=tmp_path, small=False)
    assert "loss" in output and len(read_tables(output)) == 1
    assert torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=False)["epoch"] == 0


def test_retinanet_trains_resumes_and_is_tested(coco, weights, tmp_path):
    options = ["--data-path", coco, "--model", "retinanet_cmt_ti_fpn", "--weights-backbone", weights]
    options += ["--opt", "adamw", "--lr", "1e-4", "--trainable-backbone-layers", "2", "--output-dir", "out"]
    output = run(*options, "--epochs", "1", cwd=tmp_path)
    assert "Epoch: [0] Total time" in output and len(read_tables(output)) == 1

    checkpoint = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=False)
    trained = {key: value for key, value in checkpoint["model"].items() if key.startswith(BODY)}
    given = timm.create_model(f"local-dir:{weights}", pretrained=True, features_only=True).state_dict()
    changed = [key for key, value in trained.items() if not torch.equal(value, given[key.removeprefix(BODY)])]
    assert {key.removeprefix(BODY).partition(".")[0] for key in changed} == {"stages_2", "stages_3"}
    assert not any("running" in key for key in changed)

    # train.py saves its arguments, and does not read them back: --resume fails, with any of torchvision's models.
    del checkpoint["args"]
    torch.save(checkpoint, tmp_path / "resumed.pth")
    output = run(*options, "--epochs", "2", "--resume", "resumed.pth", cwd=tmp_path)
    assert "Epoch: [1] Total time" in output and "Epoch: [0]" not in output
    resumed = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=False)
    assert resumed["epoch"] == 1 and resumed["optimizer"]["state"][0]["step"] == 6

    del resumed["args"]
    torch.save(resumed, tmp_path / "tested.pth")
    tested = run(*options, "--test-only", "--resume", "tested.pth", cwd=tmp_path)
    assert "Epoch" not in tested and read_tables(tested) == read_tables(output)


@pytest.mark.parametrize("processes", [1, 2])
def test_mask_r_cnn_trains_in_one_process_and_in_two(processes, coco, weights, tmp_path):
    options = ["--data-path", coco, "--model", "maskrcnn_cmt_ti_fpn", "--weights-backbone", weights, "--epochs", "1"]
    options += ["--opt", "adamw", "--lr", "1e-4", "--rpn-score-thresh", "0.01", "--output-dir", "out"]
    output = run(*options, cwd=tmp_path, processes=processes)
    assert f"[0/{6 // 2 // processes}]" in output or processes == 2
    assert len(read_tables(output)) == 2  # boxes and masks
    assert torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=False)["args"].world_size == processes
