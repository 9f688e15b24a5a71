"""timm's scripts, unmodified, from a clone of timm: they are not on PyPI, so TIMM_SRC names the clone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import RELEASE_FILES, authors_weights

from timm_cmt.demo import train_command, validate_command

TIMM_SRC = os.environ.get("TIMM_SRC")
pytestmark = pytest.mark.skipif(
    not TIMM_SRC,
    reason="NOT TESTED: timm's train.py, validate.py, inference.py, benchmark.py and onnx_export.py. "
    "Clone timm and run TIMM_SRC=path/to/the/clone pytest tests/test_scripts.py",
)
BOTH = pytest.mark.parametrize("model", ["cmt_ti", "cmt_b"])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ten scans of each digit as an ImageFolder."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    for label in range(10):
        for i, number in enumerate((digits.target == label).nonzero()[0][:10]):
            path = folder / ("train" if i < 7 else "validation") / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[number] * 15).astype("uint8")).resize((64, 64)).convert("RGB").save(path)
    return folder


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("torch_home") / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for model in ("cmt_ti", "cmt_b"):
        torch.save(dict(model=authors_weights(model)), folder / RELEASE_FILES[model])
    return folder


def run(command: str, cwd: Path, **environ: str) -> str:
    """Run 'script.py options' of the clone; returns what it printed."""
    script, *options = command.split()
    # Scripts import what stands beside them, so they run from a folder without the clone's own timm package.
    for path in Path(TIMM_SRC).glob("*.py"):
        (cwd / path.name).write_text(path.read_text())
    done = subprocess.run(
        [sys.executable, script, *options], cwd=cwd, env={**os.environ, **environ}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stderr + done.stdout


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """model -> (folder, checkpoint) of one epoch of train.py, trained once."""
    done = {}

    def train(model: str) -> tuple[Path, Path]:
        if model not in done:
            cwd = tmp_path_factory.mktemp(model)
            run(
                f"train.py --data-dir {data} --model {model} --img-size 64 --model-kwargs img_size=64 --num-classes 10 "
                "--epochs 1 --batch-size 16 --opt adamw --lr 1e-3 --warmup-epochs 0 --model-ema --drop 0.1 "
                "--drop-path 0.1 --layer-decay 0.8 --workers 1 --device cpu --output out --experiment test",
                cwd,
            )
            done[model] = cwd, cwd / "out" / "test" / "last.pth.tar"
        return done[model]

    return train


@BOTH
def test_train_saves_a_checkpoint_with_averaged_weights(model, trained):
    _, path = trained(model)
    checkpoint = torch.load(path, weights_only=False)
    assert checkpoint["state_dict_ema"].keys() == checkpoint["state_dict"].keys()
    assert checkpoint["state_dict"]["stages.0.rel_pos_bias.query_grid"].tolist() == [16, 16]


@BOTH
def test_resume_and_initial_checkpoint_at_another_size(model, trained, data, tmp_path):
    _, path = trained(model)
    options = (
        f"--data-dir {data} --model {model} --img-size 96 --model-kwargs img_size=96 "
        "--num-classes 10 --batch-size 16 --warmup-epochs 0 --workers 1 --device cpu --output out"
    )
    log = run(f"train.py {options} --epochs 2 --experiment resumed --resume {path} --no-resume-opt", tmp_path)
    assert "Resized the relative position bias from 64 x 64 to 96 x 96" in log
    assert "(epoch 0)" in log
    log = run(f"train.py {options} --epochs 1 --experiment initial --initial-checkpoint {path}", tmp_path)
    assert "Resized the relative position bias from 64 x 64 to 96 x 96" in log


@BOTH
def test_train_from_the_release_at_a_size_that_is_no_square(model, data, torch_home, tmp_path):
    options = (
        f"--data-dir {data} --model {model} --pretrained --input-size 3 96 160 --model-kwargs img_size=(96,160) "
        "--num-classes 10 --epochs 1 --batch-size 16 --warmup-epochs 0 --workers 1 --device cpu --output out "
        "--experiment"
    )
    run(f"train.py {options} cache", tmp_path, TORCH_HOME=str(torch_home.parent.parent))
    run(f"train.py {options} path --pretrained-path {torch_home / RELEASE_FILES[model]}", tmp_path)
    for name in ("cache", "path"):
        state = torch.load(tmp_path / "out" / name / "last.pth.tar", weights_only=False)["state_dict"]
        assert state["stages.0.rel_pos_bias.query_grid"].tolist() == [24, 40]


@BOTH
def test_validate(model, trained, data, torch_home, tmp_path):
    _, path = trained(model)
    options = f"--data-dir {data} --model {model} --workers 1 --device cpu -b 8"
    log = run(f"validate.py {options} --num-classes 10 --img-size 64 --checkpoint {path} --use-ema", tmp_path)
    results = json.loads(log.partition("--result\n")[2])
    assert results["img_size"] == 64 and results["top1"] >= 0
    log = run(f"validate.py {options} --checkpoint {torch_home / RELEASE_FILES[model]}", tmp_path)
    results = json.loads(log.partition("--result\n")[2])
    assert results["img_size"] == dict(cmt_ti=160, cmt_b=256)[model] and results["crop_pct"] == 0.875


@BOTH
def test_inference(model, trained, data, tmp_path):
    _, path = trained(model)
    run(
        f"inference.py --data-dir {data / 'validation'} --model {model} --img-size 64 --num-classes 10 "
        f"--checkpoint {path} --workers 1 --device cpu -b 8 --results-dir out --results-format csv",
        tmp_path,
    )
    rows = next((tmp_path / "out").glob("*.csv")).read_text().splitlines()
    assert len(rows) == 31


@BOTH
def test_benchmark(model, tmp_path):
    log = run(
        f"benchmark.py --model {model} --bench both --device cpu -b 2 --img-size 64 --num-warm-iter 1 "
        "--num-bench-iter 5",
        tmp_path,
    )
    assert '"infer_img_size": 64' in log and '"train_samples_per_sec"' in log


@pytest.mark.parametrize("schedule", ["constant", "progressive"])
def test_training_at_several_sizes(schedule, data, tmp_path):
    if "--train-img-sizes" not in (Path(TIMM_SRC) / "train.py").read_text():
        pytest.skip("NOT TESTED: --train-img-sizes, which this clone's train.py has not; use a newer clone")
    run(
        f"train.py --data-dir {data} --model cmt_ti --num-classes 10 --epochs 2 --batch-size 16 --warmup-epochs 0 "
        f"--workers 1 --device cpu --output out --experiment test --train-img-sizes 64 96 128 "
        f"--train-size-schedule {schedule}",
        tmp_path,
    )
    assert (tmp_path / "out" / "test" / "last.pth.tar").exists()


@pytest.mark.parametrize("script", ["validate", "inference", "benchmark"])
def test_sizes_that_are_no_squares(script, trained, data, tmp_path):
    _, path = trained("cmt_ti")
    options = "--model cmt_ti --input-size 3 96 160 --device cpu -b 8"
    data_options = f"--data-dir {data} --num-classes 10 --checkpoint {path} --workers 1"
    if script == "benchmark":
        log = run(f"benchmark.py {options} --bench inference --num-warm-iter 1 --num-bench-iter 5", tmp_path)
        assert '"infer_samples_per_sec"' in log
    else:
        log = run(f"{script}.py {options} {data_options} --results-file results.json", tmp_path)
        assert '"top1"' in log or '"prob"' in log


@BOTH
@pytest.mark.parametrize("size", ["", "--img-size 96"])
def test_onnx_export_has_no_interpolation(model, size, torch_home, tmp_path):
    onnx = pytest.importorskip("onnx", reason="NOT TESTED: onnx_export.py; pip install onnx onnxscript onnxruntime")
    run(f"onnx_export.py out.onnx --model {model} {size}", tmp_path, TORCH_HOME=str(torch_home.parent.parent))
    assert "Resize" not in {node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node}


def test_the_commands_that_the_demo_prints_run(data, tmp_path):
    command = train_command(data, "cmt_ti", epochs=1, img_size=64, device="cpu")
    run(command.removeprefix("python "), tmp_path)
    path = tmp_path / "output" / "digits" / "last.pth.tar"
    log = run(validate_command(data, "cmt_ti", 64, "cpu", path).removeprefix("python "), tmp_path)
    assert '"top1"' in log
