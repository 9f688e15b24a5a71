"""The models are in timm's registry of every process that imports timm, and `import torch` never pays or breaks."""

import os
import subprocess
import sys
import textwrap

import pytest
from common import MODELS

SHOW = "import timm; print(*sorted(timm.list_models('cmt*')))"
FIVE = " ".join(sorted(MODELS))


def python(code: str, *options: str, **environ: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter, in which any warning of ours shows on stderr."""
    env = {key: value for key, value in os.environ.items() if key != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    return subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        env={**env, **environ},
        capture_output=True,
        text=True,
        timeout=300,
    )


def output(code: str, *options: str, **environ: str) -> str:
    """What code prints in a fresh interpreter; it has to end well and say nothing on stderr."""
    done = python(code, *options, **environ)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "imports",
    [
        "import timm",
        "import torch; import timm",
        "import timm.models",
        "import timm_cmt; import torch; import timm",
        "import timm_cmt; import timm; import torch",
        "import torch; import timm_cmt; import timm",
        "import torch; import timm; import timm_cmt",
        "import timm; import timm_cmt; import torch",
        "from timm_cmt import CMT",
        "import timm_cmt.cmt",
        "import timm_cmt.rel_pos_bias",
        "import timm_cmt.checkpoint",
        "import timm_cmt.weights",
        "import timm_cmt.cli.demo",
        "import timm_cmt.cli.convert",
        "from timm_cmt import resize_rel_pos_bias; import timm",
        "import timm_cmt; timm_cmt.register(); timm_cmt.register(); import timm; timm_cmt.register()",
        "import timm_cmt.cmt, importlib; importlib.reload(timm_cmt); importlib.reload(timm_cmt.cmt)",
    ],
)
def test_every_order_of_imports_gives_the_five_models(imports):
    assert output(f"{imports}\n{SHOW}") == FIVE


def test_python_minus_I_sees_the_models():
    assert output(SHOW, "-I") == FIVE


def test_the_newest_way_to_make_a_model_works_with_no_import_of_ours():
    assert output("import timm; print(type(timm.create_model('cmt_ti', device='meta')).__module__)") == "timm_cmt.cmt"


def test_importing_torch_imports_neither_timm_nor_the_models():
    code = "import torch, sys; print([m for m in sys.modules if m.split('.')[0] in ('timm', 'timm_cmt')])"
    assert output(code) == "['timm_cmt']"


def test_importing_the_package_imports_neither_torch_nor_timm():
    assert output("import timm_cmt, sys; print('torch' in sys.modules, 'timm' in sys.modules)") == "False False"


def test_autoload_off_leaves_the_models_to_an_import():
    off = dict(TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert output(SHOW, **off) == ""
    assert output(f"import timm_cmt\n{SHOW}", **off) == FIVE


def test_a_spawned_dataloader_worker_sees_the_models(tmp_path):
    (tmp_path / "main.py").write_text(
        textwrap.dedent("""
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
    )
    done = subprocess.run([sys.executable, "main.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == FIVE, done.stderr


def test_torchrun_children_see_the_models(tmp_path):
    (tmp_path / "main.py").write_text(SHOW)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == FIVE.split() * 2, done.stderr


# A finder that makes one module fail on import, as a broken installation would.
BREAK = """
import sys

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise RuntimeError("broken on purpose")

sys.meta_path.insert(0, Broken())
"""


@pytest.mark.parametrize("module", ["timm_cmt.cmt", "timm_cmt.rel_pos_bias"])
@pytest.mark.parametrize("imports", ["import torch, timm", "import timm_cmt, torch, timm"])
def test_a_failure_is_one_warning_and_torch_and_timm_still_import(module, imports):
    code = BREAK.format(module=module) + f"{imports}\nprint(torch.__name__, *timm.list_models('cmt*'))"
    done = python(code)
    assert done.returncode == 0 and done.stdout.strip() == "torch", done.stderr
    assert done.stderr.count("broken on purpose") == done.stderr.count("timm-cmt:") == 1, done.stderr


def test_a_failure_is_survived_under_python_minus_W_error():
    done = python(
        BREAK.format(module="timm_cmt.cmt") + "import timm\nprint('alive')", "-W", "error::RuntimeWarning:timm_cmt"
    )
    assert done.returncode == 0 and done.stdout.strip() == "alive", done.stderr


@pytest.mark.parametrize("first, second", [("timm", "timm.models"), ("timm.models", "timm_cmt.cmt")])
def test_two_threads_that_import_timm_at_once_both_end(first, second):
    code = f"""
    import importlib, threading, torch
    threads = [threading.Thread(target=importlib.import_module, args=(name,)) for name in ({first!r}, {second!r})]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    import timm
    print(*sorted(timm.list_models("cmt*")))
    """
    done = python(code)  # a deadlock ends in the timeout; one thread may see Python's own error about it, timm's or not
    assert done.stdout.strip() == FIVE, done.stderr


def test_a_failure_is_survived_where_warnings_are_errors():
    done = python(
        BREAK.format(module="timm_cmt.cmt")
        + "import torch, warnings\nwarnings.simplefilter('error', RuntimeWarning)\nimport timm\nprint('alive')"
    )
    assert done.returncode == 0 and done.stdout.strip() == "alive", done.stderr
    assert done.stderr.count("timm-cmt:") == 1


def test_a_model_that_timm_has_stays_timm_s():
    code = """
    import sys, types
    from importlib.machinery import PathFinder
    import torch

    class Finder:  # as if timm had one
        def find_spec(self, name, path=None, target=None):
            if name != "timm.models._registry":
                return None
            spec = PathFinder.find_spec(name, path, target)
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), add_cmt_s(module))
            return spec

    def add_cmt_s(registry):
        module = sys.modules["timm.models.cmt"] = types.ModuleType("timm.models.cmt")
        module.nn = torch.nn
        exec("def cmt_s(pretrained=False, **kwargs): return nn.Identity()", module.__dict__)
        registry.register_model(module.cmt_s)

    sys.meta_path.insert(0, Finder())
    import timm
    print(type(timm.create_model("cmt_s")).__name__, type(timm.create_model("cmt_ti", device="meta")).__name__)
    """
    done = python(code)
    assert done.stdout.strip() == "Identity CMT", done.stderr
    assert done.stderr.count("timm has its own cmt_s") == 1, done.stderr


def test_public_names_are_there_and_others_are_not():
    import timm_cmt

    assert set(timm_cmt.__all__) <= set(dir(timm_cmt))
    assert timm_cmt.CMT.__name__ == "CMT"
    with pytest.raises(AttributeError, match="no attribute 'cmt_xxl'"):
        timm_cmt.cmt_xxl  # noqa: B018
