"""timm's own model tests, from its source distribution, on the five models: timm's yardstick for a timm model."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm
import torch
from common import MODELS, RELEASE_FILES, authors_weights

# Only timm's limits on the size of what it runs may skip a test.
SIZE_LIMIT = "Fixed input size model > limit."


@pytest.fixture(scope="module")
def timm_tests(request, tmp_path_factory) -> Path:
    """A folder with timm's test_models.py of the installed version, downloaded once and kept in pytest's cache."""
    cache = request.config.cache.mkdir(f"timm-{timm.__version__}")
    archive = cache / f"timm-{timm.__version__}.tar.gz"
    if not archive.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        folder = tmp_path_factory.mktemp("download")
        done = subprocess.run(
            [*command, "--dest", str(folder), f"timm=={timm.__version__}"], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(
                f"NOT TESTED: timm's own test-suite. Its source distribution could not be downloaded "
                f"({done.stderr.strip().splitlines()[-1:]}); run pytest again where the package index can be reached."
            )
        next(folder.iterdir()).replace(archive)
    folder = tmp_path_factory.mktemp("timm")
    with tarfile.open(archive) as tar:
        for name in ("conftest.py", "test_models.py"):
            try:
                member = tar.getmember(f"timm-{timm.__version__}/tests/{name}")
            except KeyError:  # older versions have no conftest.py
                continue
            (folder / name).write_bytes(tar.extractfile(member).read())
    return folder


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """A TORCH_HOME with files under the release's names, as if the release had been downloaded."""
    folder = tmp_path_factory.mktemp("torch_home") / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for name, file in RELEASE_FILES.items():
        torch.save(dict(model=authors_weights(name)), folder / file)
    return folder.parent.parent


def run_suite(file: Path, keyword: str, torch_home: Path, *more: str) -> dict[str, int]:
    """Run timm's tests on cmt models in a process of their own; returns how many of each outcome.

    In two processes, or in one beside other tests: timm's time limits are for tests that have their processor.
    """
    processes = "0" if "PYTEST_XDIST_WORKER" in os.environ else "2"
    options = ["-q", "-rs", "-n", processes, "-k", keyword, "-p", "no:cacheprovider", "--durations=8", *more]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, file.name],
        cwd=file.parent,
        env={**os.environ, "TORCH_HOME": str(torch_home), "OMP_NUM_THREADS": "1", "TIMEOUT": "600"},
        capture_output=True,
        text=True,
    )
    skips = re.findall(r"^SKIPPED \[\d+\] .*?: (.*)$", done.stdout, re.M)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert set(skips) <= {SIZE_LIMIT}, skips
    print(done.stdout[done.stdout.find("= slowest") :])  # -rP shows it
    return {outcome: int(count) for count, outcome in re.findall(r"(\d+) (passed|skipped|failed)", done.stdout)}


# One model is enough with the oldest versions: the five differ in numbers alone.
@pytest.mark.parametrize("names", [MODELS[:1], MODELS[1:]], ids=lambda names: f"{len(names)}_of_{len(MODELS)}")
def test_timm_s_model_tests_pass_unmodified(names, timm_tests, release):
    outcomes = run_suite(timm_tests / "test_models.py", " or ".join(names), release)
    # The forward, backward, config, torchscript, features and three FX tests of each model; two of loading for those
    # with weights.
    expected = 8 * len(names) + 2 * len(RELEASE_FILES.keys() & set(names))
    assert outcomes["passed"] + outcomes.get("skipped", 0) >= expected
    assert outcomes.get("skipped", 0) <= (4 if len(names) > 1 else 0)


@pytest.mark.skipif(
    not os.environ.get("TIMM_CMT_ABLATIONS"),
    reason="NOT TESTED: timm's own test-suite on the models of timm_cmt.ablation, which takes minutes more. Run "
    "TIMM_CMT_ABLATIONS=1 pytest tests/integration/test_timm_suite.py -k ablations",
)
def test_timm_s_model_tests_pass_on_the_ablations(timm_tests, release):
    # pytest imports what -p names before the tests, as train.py does with --device-modules.
    outcomes = run_suite(timm_tests / "test_models.py", "cmt_s_", release, "-p", "timm_cmt.ablation")
    assert outcomes["passed"] >= 8 * 8 and not outcomes.get("skipped")


def test_timm_s_tests_of_intermediates_pass_with_cmt_added_to_their_modules(timm_tests, release):
    source = (timm_tests / "test_models.py").read_text()
    edited, count = re.subn(r"(FEAT_INTER_FILTERS = \[)", r"\1'cmt', ", source, count=1)
    assert count == 1
    path = timm_tests / "test_models_edited.py"
    path.write_text(edited)
    outcomes = run_suite(path, "cmt and (intermediates or prune)", release)
    assert outcomes["passed"] >= 8 and outcomes.get("skipped", 0) <= 3
