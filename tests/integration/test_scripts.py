"""timm's scripts, unmodified, from a clone of timm: they are not on PyPI, so TIMM_SRC names the clone."""

import atexit
import csv
import functools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import timm
import torch
import yaml
from common import RELEASE_FILES, RESIZES, authors_weights, images
from interpreters import Forks
from timm.utils import reparameterize_model

from timm_cmt.cli.demo import train_command, validate_command, write_digits
from timm_cmt.cli.recipe import find_recipe, make_command

TIMM_SRC = os.environ.get("TIMM_SRC")
pytestmark = pytest.mark.skipif(
    not TIMM_SRC,
    reason="NOT TESTED: timm's train.py, validate.py, inference.py, benchmark.py, onnx_export.py, onnx_validate.py, "
    "avg_checkpoints.py, clean_checkpoint.py and hubconf.py. Clone timm and run "
    "TIMM_SRC=path/to/the/clone pytest tests/integration/test_scripts.py",
)


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
    torch.save(dict(model=authors_weights("cmt_ti")), folder / RELEASE_FILES["cmt_ti"])
    return folder


@functools.cache
def start_forks() -> Forks:
    folder = tempfile.TemporaryDirectory()
    forks = Forks(Path(folder.name), seconds=1800, OMP_NUM_THREADS="1")
    atexit.register(lambda: (forks.close(), folder.cleanup()))
    return forks


# A script as Python runs it, in a process that has imported torch. Workers that load images end with it.
FORKED = """
import multiprocessing, os, runpy, sys
cwd, words, environ = {}
os.chdir(cwd)
os.environ.update(environ)
sys.argv, sys.path[0] = words, cwd
try:
    runpy.run_path(words[0], run_name="__main__")
finally:
    for process in multiprocessing.active_children():
        process.terminate()
"""


def run(command: str, cwd: Path, fresh: bool = False, **environ: str) -> str:
    """Run 'script.py options' of the clone, or 'torchrun options script.py options'; returns what it printed.

    With `fresh`, as a user does: the interpreter is a new one, which has imported nothing. That takes 4 s longer.
    """
    if command.startswith("inference.py"):
        pytest.importorskip("pandas", reason="NOT TESTED: timm's inference.py, which wants pandas; pip install pandas")
    words = shlex.split(command)
    # Scripts import what stands beside them, so they run from a folder without the clone's own timm package.
    for path in Path(TIMM_SRC).glob("*.py"):
        (cwd / path.name).write_text(path.read_text())
    if words[0] == "torchrun":
        fresh, words[:1] = True, ["-m", "torch.distributed.run"]
    if fresh:
        environ = {**os.environ, "OMP_NUM_THREADS": "1", **environ}
        done = subprocess.run([sys.executable, *words], cwd=cwd, env=environ, capture_output=True, text=True)
    else:
        done = start_forks().run(FORKED.format((str(cwd), words, environ)))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stderr + done.stdout


def validation(data: Path) -> str:
    """Options of validate.py for a checkpoint of `runs`."""
    return (
        f"--data-dir {data} --model cmt_ti --img-size 64 --model-kwargs img_size=64 depths=1,1,1,1 --num-classes 10 "
        "--workers 1 --device cpu -b 10"
    )


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """The checkpoint of one epoch of train.py, as a user runs it."""
    cwd = tmp_path_factory.mktemp("trained")
    run(
        f"train.py --data-dir {data} --model cmt_ti --img-size 64 --model-kwargs img_size=64 --num-classes 10 "
        "--epochs 1 --batch-size 16 --opt adamw --lr 1e-3 --warmup-epochs 0 --model-ema --drop 0.1 "
        "--drop-path 0.1 --layer-decay 0.8 --workers 1 --device cpu --output out --experiment test",
        cwd,
        fresh=True,
    )
    return cwd / "out" / "test" / "last.pth.tar"


def test_train_saves_a_checkpoint_with_averaged_weights(trained):
    checkpoint = torch.load(trained, weights_only=False)
    assert checkpoint["state_dict_ema"].keys() == checkpoint["state_dict"].keys()
    assert checkpoint["state_dict"]["stages.0.rel_pos_bias.query_grid"].tolist() == [16, 16]


def test_train_finds_an_ablation_by_device_modules(data, tmp_path):
    run(
        f"train.py --data-dir {data} --device-modules timm_cmt.ablation --model cmt_s_4stage --img-size 32 "
        "--model-kwargs img_size=32 depths=(1,1,1,1) --num-classes 10 --epochs 1 --batch-size 16 --opt adamw --lr 1e-4 "
        "--warmup-epochs 0 --workers 1 --device cpu --output out --experiment test",
        tmp_path,
    )
    state = torch.load(tmp_path / "out" / "test" / "last.pth.tar", weights_only=False)["state_dict"]
    assert "stages.0.blocks.0.mlp.fc1.weight" in state and state["stem.conv1.weight"].shape[-1] == 4


def test_resume_and_initial_checkpoint_at_another_size(trained, data, tmp_path):
    options = (
        f"--data-dir {data} --model cmt_ti --img-size 96 --model-kwargs img_size=96 "
        "--num-classes 10 --batch-size 16 --warmup-epochs 0 --workers 1 --device cpu --output out"
    )
    log = run(f"train.py {options} --epochs 2 --experiment resumed --resume {trained} --no-resume-opt", tmp_path)
    assert "Resized the relative position bias from 64 x 64 to 96 x 96" in log
    assert "(epoch 0)" in log
    log = run(f"train.py {options} --epochs 1 --experiment initial --initial-checkpoint {trained}", tmp_path)
    assert "Resized the relative position bias from 64 x 64 to 96 x 96" in log


def test_train_from_the_release_at_a_size_that_is_no_square(data, torch_home, tmp_path):
    options = (
        f"--data-dir {data} --model cmt_ti --pretrained --input-size 3 96 160 --model-kwargs img_size=(96,160) "
        "--num-classes 10 --epochs 1 --batch-size 16 --warmup-epochs 0 --workers 1 --device cpu --output out "
        "--experiment"
    )
    run(f"train.py {options} cache", tmp_path, TORCH_HOME=str(torch_home.parent.parent))
    run(f"train.py {options} path --pretrained-path {torch_home / RELEASE_FILES['cmt_ti']}", tmp_path)
    for name in ("cache", "path"):
        state = torch.load(tmp_path / "out" / name / "last.pth.tar", weights_only=False)["state_dict"]
        assert state["stages.0.rel_pos_bias.query_grid"].tolist() == [24, 40]


def test_validate(trained, data, torch_home, tmp_path):
    options = f"--data-dir {data} --model cmt_ti --workers 1 --device cpu -b 8"
    log = run(f"validate.py {options} --num-classes 10 --img-size 64 --checkpoint {trained} --use-ema", tmp_path)
    results = json.loads(log.partition("--result\n")[2])
    assert results["img_size"] == 64 and results["top1"] >= 0
    log = run(f"validate.py {options} --checkpoint {torch_home / RELEASE_FILES['cmt_ti']}", tmp_path)
    results = json.loads(log.partition("--result\n")[2])
    assert results["img_size"] == 160 and results["crop_pct"] == 0.875


def test_inference(trained, data, tmp_path):
    run(
        f"inference.py --data-dir {data / 'validation'} --model cmt_ti --img-size 64 --num-classes 10 "
        f"--checkpoint {trained} --workers 1 --device cpu -b 8 --results-dir out --results-format csv",
        tmp_path,
    )
    rows = next((tmp_path / "out").glob("*.csv")).read_text().splitlines()
    assert len(rows) == 31


def test_benchmark(tmp_path):
    log = run(
        "benchmark.py --model cmt_ti --bench both --device cpu -b 2 --img-size 64 --num-warm-iter 1 --num-bench-iter 5",
        tmp_path,
    )
    assert '"infer_img_size": 64' in log and '"train_samples_per_sec"' in log


def test_benchmark_reparam_measures_the_folded_model(tmp_path):
    options = "--model cmt_ti --bench inference --device cpu -b 2 --num-warm-iter 1 --num-bench-iter 5"
    log = run(f"benchmark.py {options} --reparam", tmp_path)
    model = timm.create_model("cmt_ti")
    plain, folded = (sum(param.numel() for param in m.parameters()) for m in (model, reparameterize_model(model)))
    assert folded < plain and f"param count: {folded}\n" in log


@pytest.mark.parametrize("schedule", ["constant", "progressive"])
def test_training_at_several_sizes(schedule, data, tmp_path):
    if "--train-img-sizes" not in (Path(TIMM_SRC) / "train.py").read_text():
        pytest.skip("NOT TESTED: --train-img-sizes, which this clone's train.py has not; use a newer clone")
    run(
        f"train.py --data-dir {data} --model cmt_ti --num-classes 10 --epochs 2 --batch-size 16 --warmup-epochs 0 "
        f"--workers 1 --device cpu --output out --experiment test --train-img-sizes 64 96 128 "
        f"--train-size-schedule {schedule} --model-kwargs depths=1,1,1,1",
        tmp_path,
    )
    assert (tmp_path / "out" / "test" / "last.pth.tar").exists()


@pytest.mark.parametrize("script", ["validate", "inference", "benchmark"])
def test_sizes_that_are_no_squares(script, trained, data, tmp_path):
    options = "--model cmt_ti --input-size 3 96 160 --device cpu -b 8"
    data_options = f"--data-dir {data} --num-classes 10 --checkpoint {trained} --workers 1"
    if script == "benchmark":
        log = run(f"benchmark.py {options} --bench inference --num-warm-iter 1 --num-bench-iter 5", tmp_path)
        assert '"infer_samples_per_sec"' in log
    else:
        log = run(f"{script}.py {options} {data_options} --results-file results.json", tmp_path)
        assert '"top1"' in log or '"prob"' in log


@pytest.mark.parametrize("size", ["", "--img-size 96"])
def test_onnx_export_resizes_at_another_size_alone_and_reparam_gives_the_same_outputs(size, torch_home, tmp_path):
    onnx = pytest.importorskip("onnx", reason="NOT TESTED: onnx_export.py; pip install onnx onnxscript onnxruntime")
    runtime = pytest.importorskip("onnxruntime", reason="NOT TESTED: onnx_export.py --reparam; pip install onnxruntime")
    options = f"--model cmt_ti {size} --checkpoint {torch_home / RELEASE_FILES['cmt_ti']}"
    outputs, norms = [], []
    for option in ("", "--reparam"):
        run(f"onnx_export.py out.onnx {options} {option}", tmp_path)
        operators = [node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node]
        assert "Dropout" not in operators
        assert bool(RESIZES & set(operators)) == bool(size)  # the script builds the model at its own size
        norms.append(operators.count("BatchNormalization"))
        session = runtime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        outputs.append(session.run(None, {given.name: images(1, 3, *given.shape[2:]).numpy()})[0])
    assert norms[1] < norms[0]
    assert abs(outputs[1] - outputs[0]).max() <= 1e-4 * abs(outputs[0]).max()


def test_the_commands_that_the_demo_prints_run(data, tmp_path):
    command = train_command(data, "cmt_ti", epochs=1, img_size=64, device="cpu")
    run(command.removeprefix("python "), tmp_path)
    path = tmp_path / "output" / "digits" / "last.pth.tar"
    log = run(validate_command(data, "cmt_ti", 64, "cpu", path).removeprefix("python "), tmp_path)
    assert '"top1"' in log


# ---- options of train.py, each on a small network (one block a stage) and compared with a run that lacks it


class Runs:
    """One epoch of train.py over the 70 digits, the same in every run but for the options; run once each."""

    def __init__(self, data: Path, torch_home: Path, folder: Path):
        self.data, self.torch_home, self.folder, self.logs = data, torch_home, folder, {}

    def __call__(self, options: str = "") -> Path:
        """The output folder of a run."""
        if options not in self.logs:
            cwd = self.folder / str(len(self.logs))
            cwd.mkdir()
            log = run(
                f"train.py --data-dir {self.data} --model cmt_ti --img-size 64 --num-classes 10 --epochs 1 "
                "--batch-size 14 --opt adamw --lr 1e-3 --warmup-epochs 0 --no-aug --workers 1 --device cpu "
                f"--output out --experiment test --model-kwargs img_size=64 depths=1,1,1,1 {options}",
                cwd,
                TORCH_HOME=str(self.torch_home.parent.parent),
            )
            self.logs[options] = cwd / "out" / "test", log
        return self.logs[options][0]

    def log(self, options: str) -> str:
        self(options)
        return self.logs[options][1]

    def loss(self, options: str = "") -> float:
        with open(self(options) / "summary.csv") as file:
            return float(list(csv.DictReader(file))[-1]["train_loss"])


@pytest.fixture(scope="module")
def runs(data, torch_home, tmp_path_factory) -> Runs:
    return Runs(data, torch_home, tmp_path_factory.mktemp("runs"))


def test_mixed_precision_follows_single_precision(runs):
    assert runs.loss("--amp --amp-dtype bfloat16") == pytest.approx(runs.loss(), abs=0.02)
    assert "Training in mixed precision" in runs.log("--amp --amp-dtype bfloat16")


def test_gradient_checkpointing_gives_the_same_loss(runs):
    assert runs.loss("--grad-checkpointing") == pytest.approx(runs.loss(), abs=1e-5)


def test_compiled_training_gives_the_same_loss(runs):
    options = "--torchcompile aot_eager"
    assert runs.loss(options) == pytest.approx(runs.loss(), abs=1e-3)
    assert "backend=aot_eager" in runs.log(options)


def test_training_compiled_by_inductor_gives_the_same_loss(runs):
    if not shutil.which("g++"):
        pytest.skip("NOT TESTED: --torchcompile with inductor, which needs a C++ compiler")
    assert runs.loss("--torchcompile inductor --val-split ''") == pytest.approx(runs.loss(), abs=1e-3)


@pytest.mark.parametrize("kind", ["logit", "feature"])
def test_distillation(kind, runs):
    options = f"--kd-model-name cmt_ti --kd-distill-type {kind}"
    assert "Creating KD teacher model: 'cmt_ti'" in runs.log(options)
    assert math.isfinite(runs.loss(options)) and abs(runs.loss(options) - runs.loss()) > 0.01
    # The teacher is no part of what is saved.
    state = torch.load(runs(options) / "last.pth.tar", weights_only=False)["state_dict"]
    assert state.keys() == torch.load(runs() / "last.pth.tar", weights_only=False)["state_dict"].keys()


def test_resume_goes_on_with_the_optimizer_where_a_run_ended(runs):
    options = f"--epochs 2 --resume {runs() / 'last.pth.tar'}"
    assert "optimizer" in runs.log(options)
    with open(runs(options) / "summary.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1"]
    steps = {
        int(state["step"])
        for state in torch.load(runs(options) / "last.pth.tar", weights_only=False)["optimizer"]["state"].values()
    }
    assert steps == {10}  # five batches an epoch, two epochs
    assert runs.loss(options) < runs.loss()


@pytest.fixture(scope="module")
def recipe_run(data, tmp_path_factory) -> tuple[Path, str]:
    """(output folder, log) of `train.py -c $(timm-cmt recipe cmt_ti)` on one process."""
    cwd = tmp_path_factory.mktemp("recipe")
    log = run(
        f"train.py -c {find_recipe('cmt_ti')} --data-dir {data} --batch-size 14 --aug-repeats 0 --img-size 64 "
        "--model-kwargs img_size=64 depths=1,1,1,1 --num-classes 10 --epochs 1 --warmup-epochs 0 --cooldown-epochs 0 "
        "--amp-dtype bfloat16 --workers 1 --device cpu --output out --experiment test",
        cwd,
    )
    return cwd / "out" / "test", log


def test_a_recipe_trains_in_one_process(recipe_run):
    used = yaml.safe_load((recipe_run[0] / "args.yaml").read_text())
    assert (used["mixup"], used["cutmix"], used["reprob"], used["drop"], used["amp"]) == (0.8, 1.0, 0.25, 0.1, True)
    with open(recipe_run[0] / "summary.csv") as file:
        (row,) = csv.DictReader(file)
    assert math.isfinite(float(row["train_loss"]))


def test_train_py_finds_the_learning_rate_that_the_command_prints(recipe_run):
    printed = re.search(r"--lr ([\d.e-]+)", make_command("cmt_ti", batch_size=14))[1]
    calculated = re.search(r"Learning rate \(([\d.e-]+)\) calculated", recipe_run[1])[1]
    assert float(calculated) == pytest.approx(float(printed), rel=1e-5)


def test_a_recipe_trains_in_two_processes_with_repeated_augmentation(tmp_path):
    write_digits(tmp_path / "digits")  # repeated augmentation takes multiples of 256 images
    shutil.rmtree(tmp_path / "digits" / "validation")
    shutil.copy(Path(__file__).parent / "cpu_device.py", tmp_path)
    command = make_command("cmt_ti", batch_size=64, gpus=2, data_dir=str(tmp_path / "digits"))
    log = run(
        f"{command} --img-size 32 --model-kwargs img_size=32 depths=1,1,1,1 --num-classes 10 --epochs 1 "
        "--warmup-epochs 0 --cooldown-epochs 0 --amp-dtype bfloat16 --workers 1 --device cpu --output out "
        "--experiment test --val-split '' --device-modules cpu_device",
        tmp_path,
    )
    used = yaml.safe_load((tmp_path / "out" / "test" / "args.yaml").read_text())
    assert used["aug_repeats"] == 3
    assert "/8 " in log  # 1198 images: 1024 of them, in 8 batches of 2 x 64


# ---- validate.py, onnx_validate.py


def test_validate_reparam_changes_nothing(runs, data, tmp_path):
    command = f"validate.py {validation(data)} --checkpoint {runs() / 'last.pth.tar'}"
    one, two = (json.loads(run(c, tmp_path).partition("--result\n")[2]) for c in (command, f"{command} --reparam"))
    assert [one[key] for key in ("top1", "top5")] == [two[key] for key in ("top1", "top5")]
    assert two["param_count"] < one["param_count"]  # it has folded something


def test_validate_writes_its_results(runs, data, tmp_path):
    options = f"{validation(data)} --checkpoint {runs() / 'last.pth.tar'} --results-file results.csv"
    results = json.loads(run(f"validate.py {options}", tmp_path).partition("--result\n")[2])
    with open(tmp_path / "results.csv") as file:
        (row,) = csv.DictReader(file)
    assert row["model"] == "cmt_ti" and float(row["top1"]) == results["top1"]


def test_validate_takes_all_models_that_a_wildcard_names(data, tmp_path):
    """Those with weights, that is: timm looks the wildcard up among them only."""
    folder = tmp_path / "torch_home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for model, file in RELEASE_FILES.items():
        torch.save(dict(model=authors_weights(model)), folder / file)
    log = run(
        f"validate.py --data-dir {data} --model cmt_* --img-size 32 --workers 1 --device cpu -b 10 "
        "--results-file results.csv",
        tmp_path,
        TORCH_HOME=str(tmp_path / "torch_home"),
    )
    results = json.loads(log.partition("--result\n")[2])
    assert {result["model"] for result in results} == {f"{model}.in1k" for model in RELEASE_FILES}


def test_onnx_validate_has_validate_s_results(data, trained, tmp_path):
    pytest.importorskip("onnxruntime", reason="NOT TESTED: onnx_validate.py; pip install onnx onnxscript onnxruntime")
    run(f"onnx_export.py out.onnx --model cmt_ti --num-classes 10 --img-size 64 -b 10 --checkpoint {trained}", tmp_path)
    log = run(f"onnx_validate.py {data / 'validation'} --onnx-input out.onnx --img-size 64 -b 10 -j 1", tmp_path)
    found = re.search(r"Prec@1 ([\d.]+) .* Prec@5 ([\d.]+) \([\d.]+\)\s*$", log)
    log = run(
        f"validate.py --data-dir {data} --model cmt_ti --num-classes 10 --img-size 64 --checkpoint {trained} --use-ema "
        "--workers 1 --device cpu -b 10",
        tmp_path,
    )
    results = json.loads(log.partition("--result\n")[2])
    assert (float(found[1]), float(found[2])) == (round(results["top1"], 3), round(results["top5"], 3))


# ---- checkpoints, and torch.hub


def test_averaged_checkpoints_load_with_their_grids(runs, tmp_path):
    files = [runs() / "checkpoint-0.pth.tar", runs(f"--epochs 2 --resume {runs() / 'last.pth.tar'}") / "last.pth.tar"]
    (tmp_path / "checkpoints").mkdir()
    for i, file in enumerate(files):
        shutil.copy(file, tmp_path / "checkpoints" / f"{i}.pth.tar")
    run("avg_checkpoints.py --input checkpoints --output averaged.pth", tmp_path)
    model = timm.create_model(
        "cmt_ti", img_size=64, num_classes=10, depths=(1, 1, 1, 1), checkpoint_path=str(tmp_path / "averaged.pth")
    )
    states = [torch.load(file, weights_only=False)["state_dict"] for file in files]
    for i, stage in enumerate(model.stages):
        grid = stage.rel_pos_bias.query_grid
        assert grid.dtype == torch.int64 and grid.tolist() == [16 >> i, 16 >> i]  # the script saves them as floats
        expected = sum(state[f"stages.{i}.rel_pos_bias.weight"] for state in states) / 2
        torch.testing.assert_close(stage.rel_pos_bias.weight.detach(), expected)


@pytest.mark.parametrize("option", ["", "--safetensors"])
def test_a_cleaned_checkpoint_has_the_averaged_weights(option, trained, tmp_path):
    suffix = "safetensors" if option else "pth"
    run(f"clean_checkpoint.py --checkpoint {trained} --output clean.{suffix} --no-hash {option}", tmp_path)
    model = timm.create_model("cmt_ti", img_size=64, num_classes=10, checkpoint_path=f"{tmp_path}/clean.{suffix}")
    expected = torch.load(trained, weights_only=False)["state_dict_ema"]
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_torch_hub_finds_the_models_in_timm_s_repository(runs, tmp_path):
    code = f"""
import torch
model = torch.hub.load({str(tmp_path)!r}, "cmt_ti", source="local", num_classes=7)
print(tuple(model.eval()(torch.zeros(1, 3, 64, 64)).shape))
"""
    (tmp_path / "use_hub.py").write_text(code)
    assert "(1, 7)" in run("use_hub.py", tmp_path)
