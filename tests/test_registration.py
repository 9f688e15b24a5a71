"""The models are in timm's registry of every process that imports timm, and the detectors in torchvision's of every one
that imports torchvision; `import torch` never pays or breaks.

tests/integration/test_imports.py has what takes other programs: workers, zips, PyInstaller, jaxtyping's import hook.
"""

import shutil
import textwrap
from pathlib import Path

import pytest
from interpreters import FIVE, PURGE, SHOW, Forks, python, said

import timm_cmt


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


# ---- the models are there


def test_timm_alone_makes_our_models_even_under_python_minus_I():
    code = f"{SHOW}; print(type(timm.create_model('cmt_ti', device='meta')).__module__)"
    assert said(python(code, "-I")).splitlines() == [FIVE, "timm_cmt.cmt"]


@pytest.mark.parametrize("imports", ["import timm_cmt, timm, torch", "import timm_cmt.cmt"])
def test_every_order_of_imports_gives_the_five_models(imports):
    assert said(python(f"{imports}\n{SHOW}")) == FIVE


@pytest.mark.parametrize("imports", ["import timm, timm_cmt", "from timm_cmt import CMT"])
def test_every_order_of_imports_after_torch_gives_the_five_models(forks, imports):
    assert said(forks.run(f"{imports}\n{SHOW}")) == FIVE


def test_autoload_off_leaves_the_models_to_an_import():
    code = f"{SHOW}\nprint('-')\nimport timm_cmt\n{SHOW}"
    assert said(python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")).splitlines() == ["-", FIVE]


def test_registering_twice_changes_nothing(forks):
    code = "import timm_cmt; timm_cmt.register(); timm_cmt.register(); import timm; timm_cmt.register()"
    assert said(forks.run(f"{code}\n{SHOW}")) == FIVE


def test_torchvision_alone_has_the_detectors(forks):
    code = "import torchvision; print(*torchvision.models.list_models(include='*cmt*'))"
    variants = ("cmt_b", "cmt_l", "cmt_s", "cmt_ti", "cmt_xs")
    names = [f"{detector}_{variant}_fpn" for detector in ("maskrcnn", "retinanet") for variant in variants]
    assert said(forks.run(code)).split() == [f"{name}{suffix}" for name in names for suffix in ("", "_ms")]


def test_every_model_of_torchvision_s_still_tells_its_weights(forks):
    code = """
    from torchvision.models import get_model_weights, list_models
    print([name for name in list_models() if not list(get_model_weights(name)) and "cmt" not in name])
    """
    assert said(forks.run(code)) == "[]"


def test_a_torchvision_that_registers_no_models_has_none_of_ours_and_no_error(forks):
    code = """
    import importlib, torchvision, timm_cmt.torchvision_models
    for name in torchvision.models.list_models(include="*cmt*"):
        del torchvision.models._api.BUILTIN_MODELS[name]
    del torchvision.models._api.register_model
    importlib.reload(timm_cmt.torchvision_models)
    print(torchvision.models.list_models(include="*cmt*"))
    """
    assert said(forks.run(code)) == "[]"


def test_a_detector_that_torchvision_has_stays_torchvision_s(forks):
    code = """
    import importlib, torchvision, timm_cmt.torchvision_models
    torchvision.models._api.BUILTIN_MODELS["retinanet_cmt_s_fpn"] = lambda: "theirs"
    importlib.reload(timm_cmt.torchvision_models)
    print(torchvision.models.get_model("retinanet_cmt_s_fpn"))
    """
    assert said(forks.run(code)) == "theirs"


# ---- what `import torch` and `import timm_cmt` cost


OURS = "print(*(name for name in sys.modules if name.partition('.')[0] in ('timm', 'timm_cmt')))"


def test_importing_torch_imports_neither_timm_nor_the_models():
    code = f"import torch, sys; {OURS}; import torchvision; {OURS}"
    assert said(python(code)).splitlines() == ["timm_cmt", "timm_cmt timm_cmt.torchvision_models"]


def test_importing_the_package_imports_neither_torch_nor_timm_nor_torchvision():
    code = "import timm_cmt, sys; print(sys.modules.keys() & {'torch', 'timm', 'torchvision'})"
    assert said(python(code)) == "set()"


def test_public_names_are_there_and_others_are_not(forks):
    code = """
    import timm_cmt
    assert set(timm_cmt.__all__) <= set(dir(timm_cmt))
    assert timm_cmt.CMT.__name__ == "CMT"
    try:
        timm_cmt.cmt_xxl
    except AttributeError as err:
        print(err)
    """
    assert said(forks.run(code)) == "module 'timm_cmt' has no attribute 'cmt_xxl'"


# ---- reloaded, or purged from sys.modules as notebooks and test-suites do


@pytest.mark.parametrize(
    "before", ["", "import timm_cmt.cmt; importlib.reload(timm_cmt.cmt)", "import timm; purge('timm')"]
)
def test_a_reload_of_the_package_leaves_the_models(forks, before):
    code = f"import importlib, timm_cmt\n{before}\nimportlib.reload(timm_cmt)\n{SHOW}"
    assert said(forks.run(PURGE + code)) == FIVE


def test_a_file_of_ours_imported_after_a_purge_of_timm_uses_the_new_timm(forks):
    code = """
    import timm, timm_cmt
    purge("timm")
    import timm_cmt.detection
    assert timm_cmt.detection is sys.modules["timm_cmt.detection"]
    assert timm_cmt.detection.timm is sys.modules["timm"]
    """
    assert said(forks.run(PURGE + textwrap.dedent(code) + SHOW)) == FIVE


@pytest.mark.parametrize("packages", [("timm",), ("timm_cmt",), ("timm", "timm_cmt")], ids="-".join)
def test_purged_and_imported_again_timm_has_the_models(forks, packages):
    code = f"""
    import timm, timm_cmt.checkpoint
    for _ in range(2):
        purge(*{packages})
        import timm, timm_cmt
        from timm_cmt import checkpoint, cmt
        assert timm.model_entrypoint("cmt_ti") is cmt.cmt_ti and timm_cmt.CMT is cmt.CMT
        assert checkpoint is sys.modules["timm_cmt.checkpoint"]
    """
    assert said(forks.run(f"{PURGE}{textwrap.dedent(code)}\n{SHOW}")) == FIVE


def test_the_ablations_are_there_once_their_file_is_imported(forks):
    code = "import timm; before = len(timm.list_models('cmt*')); import timm_cmt.ablation; " + SHOW + "; print(before)"
    steps = ["", "_stem", "_lpu", "_lpu_noskip", "_irffn", "_irffn_noskip"]
    ablations = [*(f"cmt_s_4stage{step}" for step in steps), "cmt_s_layernorm", "cmt_s_batchnorm"]
    assert said(forks.run(code)).split() == [*sorted([*FIVE.split(), *ablations]), "5"]


# ---- beside other import hooks

# A finder that finds a package by itself, as jaxtyping's hook does, in front of all others.
ANSWERS_BY_ITSELF = """
import sys
from importlib.machinery import PathFinder

class Finder:
    def find_spec(self, name, path=None, target=None):
        if f"{{name}}.".startswith("{package}."):
            return PathFinder.find_spec(name, path, target)

sys.meta_path.insert(0, Finder())
"""

# A finder that asks all others, as the one of this package does.
ASKS_ALL_OTHERS = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "timm.models":
            specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
            return next(filter(None, specs), None)

sys.meta_path.insert({place}, Finder())
"""

# A finder behind ours that gives a loader whose attributes cannot be set.
LOADER_WITH_SLOTS = """
import sys
from importlib.machinery import PathFinder

class Loader:
    __slots__ = ("loader",)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        self.loader.exec_module(module)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "timm.models":
            spec = PathFinder.find_spec(name, path, target)
            real, spec.loader = spec.loader, Loader()
            spec.loader.loader = real
            return spec

sys.meta_path.insert(1, Finder())
"""


@pytest.mark.parametrize("package", ["timm.models", "timm"])
def test_a_finder_in_front_that_answers_by_itself_is_no_hindrance(forks, package):
    assert said(forks.run(ANSWERS_BY_ITSELF.format(package=package) + SHOW)) == FIVE


@pytest.mark.parametrize("place", [0, 1], ids=["in_front", "behind"])
def test_a_finder_that_asks_all_others_is_no_hindrance(forks, place):
    assert said(forks.run(ASKS_ALL_OTHERS.format(place=place) + SHOW)) == FIVE


def test_a_loader_with_slots_is_no_hindrance(forks):
    assert said(forks.run(LOADER_WITH_SLOTS + SHOW)) == FIVE


def test_a_second_package_with_the_same_finder_registers_its_models_too(forks, tmp_path):
    (tmp_path / "other").mkdir()
    shutil.copy(Path(timm_cmt.__file__), tmp_path / "other")
    (tmp_path / "other" / "torchvision_models.py").write_text("")
    (tmp_path / "other" / "cmt.py").write_text(
        "from timm.models import register_model\n\n@register_model\ndef other_net(pretrained=False, **kwargs): ...\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import other; {SHOW}; print(timm.is_model('other_net'))"
    assert said(forks.run(code)).splitlines() == [FIVE, "True"]


def test_timm_s_own_loader_is_left_as_it_was(forks):
    code = "import timm.models; print(type(timm.models.__loader__).__name__, *vars(timm.models.__spec__.loader))"
    assert said(forks.run(code)) == "SourceFileLoader name path"


@pytest.mark.parametrize("first, second", [("timm", "timm.models"), ("timm.models", "timm_cmt.cmt")])
def test_two_threads_that_import_timm_at_once_both_end(forks, first, second):
    code = f"""
    import importlib, threading
    threads = [threading.Thread(target=importlib.import_module, args=(name,)) for name in ({first!r}, {second!r})]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    """
    done = forks.run(textwrap.dedent(code) + SHOW)  # a thread may see Python's own error about a deadlock
    assert done.stdout.strip() == FIVE, done.stderr


# ---- what goes wrong is one warning

BREAK = """
import sys

class Broken:  # makes the model file fail on import, as a broken installation would
    def find_spec(self, name, path=None, target=None):
        if name == "timm_cmt.cmt":
            raise RuntimeError("broken on purpose")

sys.meta_path.insert(0, Broken())
"""


@pytest.mark.parametrize("filters", ["", "import warnings; warnings.simplefilter('error', RuntimeWarning)"])
def test_a_failure_is_one_warning_and_timm_still_imports(forks, filters):
    done = forks.run(f"{BREAK}\n{filters}\nimport timm_cmt, timm, torch\nprint('alive', *timm.list_models('cmt*'))")
    assert done.returncode == 0 and done.stdout.strip() == "alive", done.stderr
    assert done.stderr.count("broken on purpose") == done.stderr.count("timm-cmt:") == 1, done.stderr


def test_a_failure_in_torchvision_s_part_is_one_warning_and_timm_has_its_models():
    code = f"{BREAK.replace('timm_cmt.cmt', 'timm_cmt.torchvision_models')}\nimport torchvision\n{SHOW}"
    done = python(code)
    assert done.returncode == 0 and done.stdout.strip() == FIVE, done.stderr
    assert done.stderr.count("broken on purpose") == done.stderr.count("timm-cmt:") == 1, done.stderr


def test_a_model_that_timm_has_stays_timm_s(forks):
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
    done = forks.run(code)
    assert done.stdout.strip() == "Identity CMT", done.stderr
    assert done.stderr.count("timm has its own cmt_s") == 1, done.stderr
