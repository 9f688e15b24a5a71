"""Many processes: DDP through timm's train.py, and FSDP2, on the CPU with gloo, are what one process is.

train.py cannot do this on the CPU by itself: cpu_device.py says what is lacking, and lends it.
"""

import csv
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsdp_worker
import numpy as np
import pytest
import timm
import torch
from fsdp_worker import BUILT, OTHER, evaluate, make, run

TIMM_SRC = os.environ.get("TIMM_SRC")


def launch(processes: int, *arguments: str, cwd: Path) -> str:
    """Run a script in this many processes, as torchrun does; returns what they printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stderr + done.stdout


# ---- DDP, through train.py


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Path:
    """32 images of two classes as an ImageFolder."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        for i in range(32):
            path = folder / split / str(i % 2) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def train(noise, tmp_path_factory):
    """processes -> (summary.csv's rows, checkpoint) of three updates over the same 32 images at a time."""
    if not TIMM_SRC:
        pytest.skip(
            "NOT TESTED: train.py in many processes. Clone timm and run "
            "TIMM_SRC=path/to/the/clone pytest tests/integration/test_distributed.py"
        )

    def train(processes: int) -> tuple[list[dict[str, str]], dict[str, torch.Tensor]]:
        cwd = tmp_path_factory.mktemp("train")
        (cwd / "train.py").write_text((Path(TIMM_SRC) / "train.py").read_text())
        (cwd / "cpu_device.py").write_text((Path(__file__).parent / "cpu_device.py").read_text())
        options = (
            f"--data-dir {noise} --model cmt_ti --img-size 64 --model-kwargs img_size=64 --num-classes 2 --epochs 3 "
            f"--batch-size {32 // processes} --opt sgd --lr 0.05 --warmup-epochs 0 --no-aug --workers 1 --device cpu "
            "--output out --experiment test"
        )
        sync = "--sync-bn --grad-checkpointing --device-modules cpu_device" if processes > 1 else ""
        log = launch(processes, "train.py", *options.split(), *sync.split(), cwd=cwd)
        assert ("total 2" in log and "Synchronized BatchNorm" in log) == (processes == 2)
        with open(cwd / "out" / "test" / "summary.csv") as file:
            rows = list(csv.DictReader(file))
        return rows, torch.load(cwd / "out" / "test" / "last.pth.tar", weights_only=False)["state_dict"]

    return functools.cache(train)


def test_two_processes_have_the_loss_of_one_with_the_doubled_batch(train):
    one, two = ([float(row["train_loss"]) for row in train(n)[0]] for n in (1, 2))
    assert len(one) == 3 and one[2] < one[0] - 0.05  # it learns, so that the gradients count
    assert two == pytest.approx(one, abs=1e-4)


def test_two_processes_validate_as_one(train):
    one, two = ([float(row["eval_loss"]) for row in train(n)[0]] for n in (1, 2))
    assert two == pytest.approx(one, abs=1e-4)


def test_two_processes_save_the_running_statistics_of_one(train):
    one, two = (train(n)[1] for n in (1, 2))
    assert one.keys() == two.keys()
    for name in one:
        if "running" in name:
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)


# ---- FSDP2


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory) -> tuple[dict, Path]:
    """What fsdp_worker wrote: its results, and the distributed checkpoint."""
    if torch.__version__.startswith("2.6."):
        pytest.skip("NOT TESTED: FSDP2, which in torch 2.6 does not run on the CPU; use a newer torch")
    folder = tmp_path_factory.mktemp("fsdp")
    launch(2, fsdp_worker.__file__, str(folder), cwd=folder)
    return torch.load(folder / "results.pt", weights_only=False), folder / "checkpoint"


@pytest.fixture(scope="module")
def alone() -> Iterator[dict]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers have: AdamW's first update makes much of how sums were rounded
    yield run(make(seed=0))
    torch.set_num_threads(threads)


def test_fsdp_shards_every_parameter(fsdp):
    assert fsdp[0]["sharded"] == {name for name, _ in make(seed=0).named_parameters()}


def test_fsdp_has_the_losses_of_one_process_at_its_own_size_and_at_another(fsdp, alone):
    assert fsdp[0]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert abs(alone["losses"][-1] - alone["losses"][0]) > 0.5  # the updates count


@pytest.mark.parametrize("size", [BUILT, OTHER])
@pytest.mark.parametrize("when", ["before", "after"])
def test_fsdp_evaluates_as_one_process_before_and_after_training(when, size, fsdp, alone):
    torch.testing.assert_close(fsdp[0][when][size], alone[when][size], rtol=1e-4, atol=1e-4)
    assert (alone["before"][size] - alone["after"][size]).abs().max() > 0.1  # what was kept before would be stale


@pytest.mark.parametrize("size", [BUILT, OTHER])
def test_the_weights_that_fsdp_gathers_are_a_plain_model_s(size, fsdp):
    model = make(seed=1)
    model.load_state_dict(fsdp[0]["weights"])
    torch.testing.assert_close(evaluate(model, size), fsdp[0]["after"][size], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [BUILT, OTHER])
def test_a_distributed_checkpoint_comes_back(size, fsdp):
    results, _ = fsdp
    assert torch.equal(results["loaded"][size], results["after"][size])
    assert not torch.allclose(results["unloaded"], results["after"][OTHER], atol=0.1)


def test_a_distributed_checkpoint_brings_the_optimizer_back(fsdp):
    kept, loaded = fsdp[0]["next losses"]
    assert kept == pytest.approx(loaded, abs=1e-5)


@pytest.mark.parametrize("size", [BUILT, OTHER])
def test_a_distributed_checkpoint_becomes_a_file_that_timm_loads(size, fsdp, tmp_path):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    results, checkpoint = fsdp
    dcp_to_torch_save(checkpoint, tmp_path / "whole.pth")
    torch.save(dict(state_dict=torch.load(tmp_path / "whole.pth")["model"]), tmp_path / "model.pth")
    model = timm.create_model(
        "cmt_ti", img_size=size, num_classes=10, depths=(1, 1, 2, 1), checkpoint_path=str(tmp_path / "model.pth")
    )
    torch.testing.assert_close(evaluate(model, size), results["after"][size], rtol=1e-4, atol=1e-4)
