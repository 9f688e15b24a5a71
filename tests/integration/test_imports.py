"""The models are there in whatever way Python, timm and this package are run: workers, zips, frozen, hooked."""

import os
import pkgutil
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from pathlib import Path

import pytest
import timm
from interpreters import FIVE, PURGE, SHOW, clean_environ, python, said

import timm_cmt


def run(*command: str | Path, cwd: Path, **environ: str) -> subprocess.CompletedProcess:
    command = [str(part) for part in command]
    return subprocess.run(command, cwd=cwd, env=clean_environ(**environ), capture_output=True, text=True, timeout=1800)


# ---- any file first


def test_any_file_of_the_package_can_be_imported_first():
    modules = [module.name for module in pkgutil.walk_packages(timm_cmt.__path__, "timm_cmt.")]
    modules = [name for name in modules if "_pyinstaller" not in name and not name.endswith("__main__")]
    code = f"""
    import importlib
    for module in {modules}:
        purge("timm", "timm_cmt")
        importlib.import_module(module)
        import timm
        print(module, *sorted(timm.list_models("cmt*")))
    """
    for name, line in zip(modules, said(python(PURGE + textwrap.dedent(code))).splitlines(), strict=True):
        # The ablations are there where their file is imported, and nowhere else.
        assert line == f"{name} {FIVE}" or (name == "timm_cmt.ablation" and set(FIVE.split()) < set(line.split()))


# ---- worker processes


def test_a_spawned_dataloader_worker_sees_the_models(tmp_path):
    (tmp_path / "main.py").write_text("""
import torch

class Names(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        import timm
        return " ".join(sorted(timm.list_models("cmt*")))

if __name__ == "__main__":
    loader = torch.utils.data.DataLoader(Names(), num_workers=1, multiprocessing_context="spawn")
    print(*next(iter(loader)))
""")
    done = run(sys.executable, "main.py", cwd=tmp_path)
    assert done.stdout.strip() == FIVE, done.stderr


def test_torchrun_children_see_the_models(tmp_path):
    # A file for each, because two processes that print at once get into each other's lines.
    (tmp_path / "main.py").write_text("""
import os, timm
with open(f"names_{os.environ['RANK']}.txt", "w") as file:
    print(*sorted(timm.list_models("cmt*")), file=file)
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main.py"]
    done = run(*command, cwd=tmp_path)
    names = {path.name: path.read_text().strip() for path in tmp_path.glob("names_*.txt")}
    assert names == {"names_0.txt": FIVE, "names_1.txt": FIVE}, done.stderr


# ---- zips


def test_timm_in_a_zip_has_the_models(tmp_path):
    folder = Path(timm.__file__).parent
    with zipfile.ZipFile(tmp_path / "timm.zip", "w") as file:
        for path in folder.rglob("*"):
            if path.suffix != ".pyc":
                file.write(path, path.relative_to(folder.parent))
    code = f"{SHOW}; print(timm.__file__)"
    search_path = os.pathsep.join(map(str, (tmp_path / "timm.zip", Path(timm_cmt.__file__).parents[1])))
    shown = said(run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=search_path)).splitlines()
    assert shown == [FIVE, str(tmp_path / "timm.zip" / "timm" / "__init__.py")]


def test_the_package_in_a_zip_has_the_models_and_reads_its_data_files(wheel, tmp_path):
    # A wheel is a zip, and Python can import from it.
    code = """
    import os
    os.environ.pop("TIMM_CMT_HUB_ORG")  # which the tests set, so that hub.json counts
    timm.create_model("cmt_ti", device="meta")
    import timm_cmt.weights
    from timm_cmt.cli.cards import make_card
    print(timm_cmt.__file__, timm_cmt.weights.get_hub_id("unpublished"), "license: mit" in make_card("cmt_ti"))
    """
    command = [sys.executable, "-c", SHOW + textwrap.dedent(code)]
    shown = said(run(*command, cwd=tmp_path, PYTHONPATH=str(wheel))).splitlines()
    assert shown == [FIVE, f"{wheel}/timm_cmt/__init__.py None True"]


# ---- PyInstaller


def test_a_program_frozen_by_pyinstaller_has_the_models(wheel, tmp_path):
    pytest.importorskip(
        "PyInstaller",
        reason="NOT TESTED: PyInstaller; pip install pyinstaller and run pytest tests/integration/test_imports.py "
        "(7 minutes, 7 GB while it runs)",
    )
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    done = run(*pip, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "main.py").write_text(f"{SHOW}; timm.create_model('cmt_ti')")
    with tempfile.TemporaryDirectory() as folder:  # pytest would keep its 7 GB
        build = [sys.executable, "-m", "PyInstaller", "--distpath", folder, "--workpath", f"{folder}/build", "main.py"]
        done = run(*build, cwd=tmp_path, PYTHONPATH=str(site))
        assert done.returncode == 0, done.stderr
        assert said(run(f"{folder}/main/main", cwd=tmp_path)) == FIVE


# ---- other import hooks


def test_jaxtyping_s_import_hook_leaves_the_models():
    pytest.importorskip(
        "jaxtyping",
        reason="NOT TESTED: beside another import hook; pip install jaxtyping and run "
        "pytest tests/integration/test_imports.py",
    )
    code = """
    import torch
    from jaxtyping import install_import_hook
    with install_import_hook("timm.models", None):
        import timm
    """
    assert said(python(textwrap.dedent(code) + SHOW)) == FIVE
