"""timm-cmt: the CMT models (arXiv 2107.06263) for timm.

PyTorch loads every entry point of the group ``torch.backends`` at the end of ``import torch``; ours is `register`. It
arranges that the models enter timm's registry when timm is imported, and it is all that ``import torch`` costs:
neither torch nor timm is imported here.
"""

import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cmt import CMT as CMT
    from .rel_pos_bias import resize_rel_pos_bias as resize_rel_pos_bias

__version__ = "0.1.0"
__all__ = ["CMT", "register", "resize_rel_pos_bias"]

_PUBLIC_NAMES = {"CMT": "cmt", "resize_rel_pos_bias": "rel_pos_bias"}
# The module timm.models that has our models in its registry. A reload of this package must not forget it.
_timm_models: Any = globals().get("_timm_models")


def register() -> None:
    """Put the models into timm's registry: as soon as timm is imported, or at once if it already has been.

    Never raises, since it runs inside ``import torch``: what goes wrong becomes one warning. It can be called again.
    """
    try:
        if not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
            sys.meta_path.insert(0, _TimmFinder())
        if sys.modules.get("timm.models"):
            _import_models()
    except Exception as err:
        _warn_not_registered(err)


def _import_models() -> None:
    global _timm_models
    timm_models = sys.modules["timm.models"]
    if _timm_models not in (None, timm_models):
        # timm was removed from sys.modules and imported again. Our modules use the old one: import them again too.
        for name in [name for name in sys.modules if name.startswith(f"{__name__}.")]:
            del sys.modules[name]
            globals().pop(name.rpartition(".")[2], None)
    _timm_models = timm_models
    # A file of ours that imports timm may be the first thing that is imported. It is half made now: cmt needs it whole.
    half_made = [name for name in sys.modules if name.startswith(f"{__name__}.") and _is_half_made(sys.modules[name])]
    if f"{__name__}.cmt" not in half_made:  # it registers the models by itself
        for name in half_made:
            del sys.modules[name]
        import_module(f"{__name__}.cmt")  # importing it registers the models


def _is_half_made(module: Any) -> bool:
    return getattr(getattr(module, "__spec__", None), "_initializing", False)  # Python's own mark; it has no public one


class _TimmFinder:
    """Finds timm.models as the other finders do, and wraps the loader that they give.

    It stays on sys.meta_path, because timm may be removed from sys.modules and imported again, and nothing else would
    tell us. It costs less than a microsecond for each module that Python looks for.
    """

    _is_asking = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name == "timm" or ("timm" in sys.modules and "timm.models" not in sys.modules):
            self._come_first()
        if name != "timm.models" or self._is_asking:
            return None
        # Another finder may ask all finders too, this one among them. One flag is enough for all threads: Python calls
        # finders under its import lock.
        self._is_asking = True
        try:
            finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
            spec: Any = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        finally:
            self._is_asking = False
        if spec is not None:
            try:
                spec.loader = _TimmLoader(spec.loader)
            except Exception as err:
                _warn_not_registered(err)
        return spec

    def _come_first(self) -> None:
        # timm is being imported. A finder in front of this one might find timm.models without asking the others.
        if sys.meta_path[:1] != [self]:
            # In one step, because another thread may be reading the list.
            sys.meta_path[:] = [self, *(finder for finder in sys.meta_path if finder is not self)]


class _TimmLoader:
    """Loads timm.models by its real loader, then has our models imported.

    All within the import lock of timm.models: a second thread that imports timm waits, as for any module.
    """

    _loader: Any = None  # here too, or __getattr__ would call itself for ever on an object without it (copy makes such)

    def __init__(self, loader: Any) -> None:
        self._execute = loader.exec_module
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: Any) -> None:
        try:
            module.__spec__.loader = module.__loader__ = self._loader  # what is seen of timm.models is as without us
        except AttributeError:  # a module that does not let itself be changed: importlib leaves it as it is, too
            pass
        self._execute(module)
        try:
            import_module(__name__).register()  # by name, since this package may have been imported again too
        except Exception as err:
            _warn_not_registered(err)


def _warn_not_registered(err: Exception) -> None:
    message = f"timm-cmt: the CMT models are not in timm's registry ({type(err).__name__}: {err})"
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # under `python -W error`: torch has to import all the same
        print(message, file=sys.stderr)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC_NAMES})


register()
