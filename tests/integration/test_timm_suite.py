"""timm's own model tests, from its source distribution, on the five models: timm's yardstick for a timm model."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm
import torch
from common import MODELS, RELEASE_FILES, authors_weights

EDITED = "test_models_edited.py"  # timm's file with CMT among the modules whose intermediate features it tests
# Only timm's limits on the size of what it runs may skip a test, of these models at most so many.
SIZE_LIMIT = "Fixed input size model > limit."
SKIPPED = dict(cmt_b=1, cmt_l=3)
EDITED_SKIPPED = dict(cmt_l=3)


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


def run_suite(folder: Path, torch_home: Path, keyword: str, *more: str) -> dict[tuple[str, str], list[str]]:
    """(file, model) -> how each of timm's tests of that model ended: passed, or else why it did not.

    In two processes, or in one beside other tests: timm's time limits are for tests that have their processor.
    """
    processes = "0" if "PYTEST_XDIST_WORKER" in os.environ else "2"
    options = ["-q", "-n", processes, "-k", keyword, "-p", "no:cacheprovider", "--durations=12", "--junit-xml=out.xml"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *more],
        cwd=folder,
        env={**os.environ, "TORCH_HOME": str(torch_home), "OMP_NUM_THREADS": "1", "TIMEOUT": "600"},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout[-6000:] + done.stderr[-2000:]  # 1: some have failed
    print(done.stdout[done.stdout.find("= slowest") :])  # -rP shows it
    found: dict[tuple[str, str], list[str]] = {}
    for case in ElementTree.parse(folder / "out.xml").iter("testcase"):
        ends = [end.get("message", "") + (end.text or "") for end in case if end.tag in ("failure", "error")]
        ends += [end.get("message", "") for end in case if end.tag == "skipped"]
        model = re.search(r"cmt_[a-z0-9_]+", case.get("name"))[0]
        found.setdefault((case.get("classname"), model), []).append(ends[0] if ends else "passed")
    return found


@pytest.fixture(scope="module")
def outcomes(request, timm_tests, release) -> dict[tuple[str, str], list[str]]:
    """What `run_suite` gives for all files and all models that are asked for.

    They run in one process, since timm and its 18000 tests take long to load.
    """
    tests = [item for item in request.session.items if item.path == Path(__file__)]
    asked = {item.callspec.params["name"] for item in tests if hasattr(item, "callspec")}
    source = (timm_tests / "test_models.py").read_text()
    edited, count = re.subn(r"(FEAT_INTER_FILTERS = \[)", r"\1'cmt', ", source, count=1)
    assert count == 1
    (timm_tests / EDITED).write_text(edited)
    models = " or ".join(name for name in MODELS if name in asked)
    return run_suite(
        timm_tests, release, f"({models}) and (not edited or intermediates or prune)", "test_models.py", EDITED
    )


@pytest.mark.parametrize("name", MODELS)
def test_timm_s_model_tests_pass_unmodified(name, outcomes):
    ends = outcomes["test_models", name]
    assert set(ends) <= {"passed", SIZE_LIMIT}, "\n".join(ends)
    # Forward, backward, configuration, TorchScript, features and three of FX; two of loading for those with weights.
    assert len(ends) >= 8 + 2 * (name in RELEASE_FILES)
    assert ends.count(SIZE_LIMIT) <= SKIPPED.get(name, 0)


@pytest.mark.parametrize("name", MODELS)
def test_timm_s_tests_of_intermediates_pass_with_cmt_added_to_their_modules(name, outcomes):
    ends = outcomes[EDITED.removesuffix(".py"), name]
    assert set(ends) <= {"passed", SIZE_LIMIT}, "\n".join(ends)
    assert len(ends) >= 2 and ends.count(SIZE_LIMIT) <= EDITED_SKIPPED.get(name, 0)


@pytest.mark.skipif(
    not os.environ.get("TIMM_CMT_ABLATIONS"),
    reason="NOT TESTED: timm's own test-suite on the models of timm_cmt.ablation, which takes minutes more. Run "
    "TIMM_CMT_ABLATIONS=1 pytest tests/integration/test_timm_suite.py -k ablations",
)
def test_timm_s_model_tests_pass_on_the_ablations(timm_tests, release):
    # pytest imports what -p names before the tests, as train.py does with --device-modules.
    outcomes = run_suite(timm_tests, release, "cmt_s_", "-p", "timm_cmt.ablation", "test_models.py")
    assert len(outcomes) == 8
    for (_, name), ends in outcomes.items():
        assert set(ends) == {"passed"} and len(ends) >= 8, f"{name}: {ends}"
