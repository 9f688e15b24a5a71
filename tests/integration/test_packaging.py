"""What is built installs by itself, and a wheel registers the models as an editable install does."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import timm_cmt

ROOT = Path(__file__).parents[2]


def test_the_wheel_holds_the_package_and_its_entry_point(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        info = f"timm_cmt-{timm_cmt.__version__}.dist-info"
        entry_points = file.read(f"{info}/entry_points.txt").decode()
        metadata = file.read(f"{info}/METADATA").decode()
    package = ROOT / "timm_cmt"
    assert {f"timm_cmt/{path.relative_to(package)}" for path in package.rglob("*.py")} <= set(names)
    assert {"timm_cmt/hub.json", "timm_cmt/cli/model_card.md"} <= set(names)
    assert "timm_cmt/py.typed" in names and any(n.endswith("/LICENSE") for n in names)
    assert {f"timm_cmt/recipes/{path.name}" for path in (ROOT / "timm_cmt" / "recipes").iterdir()} <= set(names)
    assert not any(n.startswith(("tests", "benchmarks")) for n in names)
    assert "[torch.backends]\ntimm_cmt = timm_cmt:register" in entry_points
    assert "timm-cmt = timm_cmt.cli:main" in entry_points
    assert "[pyinstaller40]\nhook-dirs = timm_cmt._pyinstaller:get_hook_dirs" in entry_points
    assert {f"timm_cmt/_pyinstaller/hook-{module}.py" for module in ("timm.models", "timm_cmt")} <= set(names)
    assert re.search(r"^License-Expression: Apache-2.0$", metadata, re.M)
    assert "Requires-Dist: torch>=2.6" in metadata and "Requires-Dist: timm>=1.0.26" in metadata


def test_changelog_and_citation_are_of_this_version():
    assert f"\n## {timm_cmt.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {timm_cmt.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_installed_wheel_registers_the_models(installed, tmp_path):
    # Its metadata comes first on the path, so that it is this installation whose entry point torch calls.
    done = subprocess.run(
        [sys.executable, "-c", "import timm, timm_cmt; print(timm_cmt.__file__, len(timm.list_models('cmt*')))"],
        env={**os.environ, "PYTHONPATH": str(installed)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(installed / "timm_cmt" / "__init__.py"), "5"], done.stderr


def test_a_package_without_its_record_of_published_weights_has_published_none(wheel, tmp_path):
    zipped = tmp_path / "package.zip"  # test_imports.py reads the record from a zip that has it
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(zipped, "w") as target:
        for name in source.namelist():
            if name != "timm_cmt/hub.json":
                target.writestr(name, source.read(name))
    code = "import timm_cmt.weights; print(timm_cmt.__file__, timm_cmt.weights.get_hub_id('cmt_ti.in1k'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={key: value for key, value in os.environ.items() if key != "TIMM_CMT_HUB_ORG"}
        | dict(PYTHONPATH=str(zipped)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [f"{zipped}/timm_cmt/__init__.py", "None"], done.stderr
