"""The READMEs: links lead somewhere, Python blocks run as they stand, the tree of imports is true."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from common import RELEASE_FILES, SMALL, authors_weights
from PIL import Image

from timm_cmt.cli.convert import convert, convert_release

ROOT = Path(__file__).parents[2]
ADDRESS = r"https://(?:raw\.githubusercontent\.com/timm-cmt/timm-cmt/main|github\.com/timm-cmt/timm-cmt/blob/main)/"
PAGES = [str(path.relative_to(ROOT)) for path in sorted(ROOT.rglob("README.md")) if ".in1k" not in str(path)]
PAGES = [page for page in PAGES if not page.startswith((".", "build", "tests/parity"))]
LINKED = [*PAGES, "benchmarks/examples/runtimes.md"]  # which has no blocks to run


def read_blocks(page: str, language: str) -> dict[str, list[str]]:
    """Heading of each section of a page -> its blocks of a language."""
    blocks: dict[str, list[str]] = {}
    for section in re.split(r"^## ", (ROOT / page).read_text(encoding="utf-8"), flags=re.M):
        found = re.findall(rf"^```{language}\n(.*?)^```", section, re.M | re.S)
        if found:
            blocks[section.partition("\n")[0]] = found
    return blocks


def test_the_pages_are_there():
    assert PAGES == [
        "README.md",
        "benchmarks/README.md",
        "benchmarks/examples/README.md",
        "hub_configs/README.md",
        "hub_configs/space/README.md",
        "tests/README.md",
        "timm_cmt/recipes/README.md",
    ]


# ---- links, and the tree of imports


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    targets = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r"^\[\w+\]: (\S+)$", text, re.M)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    anchors = {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in targets:
        own = re.match(ADDRESS, target)
        if target.startswith("#"):
            assert target in anchors
        elif own:
            assert (ROOT / target[own.end() :]).is_file(), target
        elif not target.startswith("https://"):
            assert page != "README.md", f"{target}: PyPI shows this page without the files beside it"
            assert (ROOT / page).parent.joinpath(target.partition("#")[0]).is_file(), target


def test_the_tree_of_imports_is_true():
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    drawn = {
        name.removesuffix(".py").rstrip("/"): set(re.findall(r"\w+", re.sub(r"\(.*", "", below))) & set(modules())
        for name, below in re.findall(r"^(\S+) +-> (.*)$", text, re.M)
    }
    found: dict[str, set[str]] = {name: set() for name in modules()}
    for path in (ROOT / "timm_cmt").rglob("*.py"):
        parts = path.relative_to(ROOT / "timm_cmt").with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if parts[0] in found and isinstance(node, ast.ImportFrom) and node.level:
                # `from .x import` in a folder stays in it; `from ..x import` leaves it.
                below = parts[0] if node.level < len(parts) else (node.module or "").partition(".")[0]
                found[parts[0]] |= {below} & set(modules()) - {parts[0], ""}
    assert drawn == found


def modules() -> list[str]:
    entries = (ROOT / "timm_cmt").iterdir()
    names = [entry.stem for entry in entries if entry.suffix == ".py" or entry.name == "cli"]
    return [name for name in names if name]


# ---- Python


@pytest.fixture(scope="module")
def internet(tmp_path_factory) -> Path:
    """What the blocks would download: the release of two models in a TORCH_HOME, a repository in the Hub's cache."""
    folder = tmp_path_factory.mktemp("internet")
    checkpoints = folder / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(folder / "torch"))
        for name in ("cmt_ti", "cmt_s"):
            torch.save(dict(model=authors_weights(name)), checkpoints / RELEASE_FILES[name])
            convert_release(name, folder / f"{name}.in1k")
    repository = folder / "hub" / "models--ORG--cmt_s.in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder / "cmt_s.in1k", repository / "snapshots" / ("0" * 40))
    return folder


@pytest.fixture(scope="module")
def desk(internet, tmp_path_factory) -> Path:
    """The folder in which a reader runs the blocks: a picture, converted models, files under the names of the pages."""
    folder = tmp_path_factory.mktemp("desk")
    Image.effect_mandelbrot((320, 240), (-2, -1, 1, 1), 50).convert("RGB").save(folder / "image.jpg")
    shutil.copy(internet / "torch" / "hub" / "checkpoints" / "cmt_small.pth", folder)
    shutil.copytree(internet / "cmt_ti.in1k", folder / "cmt_ti.in1k")
    shutil.copytree(internet / "cmt_s.in1k", folder / "path" / "to" / "cmt_s.in1k")
    torch.save(timm.create_model("cmt_ti", **dict(SMALL, num_classes=2)).state_dict(), folder / "own.pth")
    (folder / "names.txt").write_text("cat\ndog\n")
    given = dict(model="cmt_ti", model_kwargs=dict(depths=SMALL["depths"]))
    convert(folder / "own.pth", folder / "mine", given, labels=folder / "names.txt")
    return folder


@pytest.fixture
def at_the_desk(desk, internet, monkeypatch):
    monkeypatch.chdir(desk)
    monkeypatch.setenv("TORCH_HOME", str(internet / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(internet / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("page", "section"), [(page, section) for page in PAGES for section in read_blocks(page, "python")]
)
def test_python_runs_as_it_stands(page, section, at_the_desk):
    torch.manual_seed(0)
    names: dict = {}  # the blocks of a section are one session
    for block in read_blocks(page, "python")[section]:
        if "onnx.export" in block and torch.__version__.startswith("2.6."):
            pytest.skip(f"NOT TESTED: {section} in {page} with torch 2.6, whose exporter knows no BatchNorm")
        if "init_process_group" in block:
            run_in_processes(block)
            continue
        try:
            exec(compile(block, f"{page}, {section}", "exec"), names)  # noqa: S102
        except ModuleNotFoundError as err:
            pytest.skip(f"NOT TESTED: {section} in {page}; pip install -e '.[test]' brings {err.name}")
    check(names)


def run_in_processes(block: str) -> None:
    if torch.__version__.startswith("2.6."):
        pytest.skip("NOT TESTED: FSDP2 as the page has it, which in torch 2.6 does not run on the CPU")
    Path("fsdp.py").write_text(block)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "fsdp.py"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def check(names: dict) -> None:
    """What the comments in the blocks say of what they make."""
    if "heat" in names:
        assert names["heat"].shape == (2, 160, 160) and (names["heat"].max(axis=(1, 2)) > 0.9).all()
    if "embedding" in names:
        assert names["features"].shape == (1, 1280, 6, 8) and names["embedding"].shape == (1, 1280)
        assert len(names["maps"]) == 5
    if "session" in names:
        assert names["logits"].shape == (5, 1000)
    if "found" in names:
        assert all(output.keys() >= {"boxes", "labels", "scores"} for output in names["found"])
    if "probabilities" in names:
        assert names["names"] == ["cat", "dog"]
