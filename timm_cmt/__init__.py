"""timm-cmt: the CMT models (arXiv 2107.06263) for timm.

PyTorch loads every entry point of the group ``torch.backends`` at the end of ``import torch``; ours is `register`. It
arranges that the models enter timm's registry when timm is imported, and it is all that ``import torch`` costs:
neither torch nor timm is imported here.
"""

import sys
import warnings
from importlib import import_module
from threading import get_ident
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
        finder = next((finder for finder in sys.meta_path if type(finder).__module__ == __name__), None)
        if finder is None:
            finder = _Finder()
            sys.meta_path.insert(0, finder)
        if sys.modules.get("timm.models"):
            _import_models(finder)
    except Exception as err:
        _warn_not_registered(err)


def _import_models(finder: Any) -> None:
    global _timm_models
    timm_models = sys.modules["timm.models"]
    if _timm_models not in (None, timm_models):
        # timm was removed from sys.modules and imported again. Our files use the old one: import them again too.
        begun = {name for _, name in finder.begun}
        for name in [name for name in sys.modules if name.startswith(f"{__name__}.") and name not in begun]:
            del sys.modules[name]
            globals().pop(name.rpartition(".")[2], None)
    _timm_models = timm_models
    # If one of our files was imported first, and imported timm, it is half made, and the model file may need it. Then
    # its loader calls `register` once it is complete.
    if get_ident() not in {thread for thread, _ in finder.begun}:
        import_module(f"{__name__}.cmt")  # importing it registers the models


class _Finder:
    """Finds timm.models and our own files as the other finders do, and wraps the loaders that they give.

    It stays on sys.meta_path, because timm may be removed from sys.modules and imported again, and nothing else would
    tell us. It costs less than a microsecond for each module that Python looks for.
    """

    def __init__(self) -> None:
        self.begun: list[tuple[int, str]] = []  # thread and name of each import that has begun and not ended
        self._asked: list[str] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name == "timm" or ("timm" in sys.modules and "timm.models" not in sys.modules):
            self._come_first()
        if (name != "timm.models" and not name.startswith(f"{__name__}.")) or name in self._asked:
            return None
        # Another finder may ask all finders too, this one among them. One list is enough for all threads: Python calls
        # finders under its import lock.
        self._asked.append(name)
        try:
            finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
            spec: Any = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        finally:
            self._asked.remove(name)
        if spec is not None:
            try:
                spec.loader = _Loader(spec.loader, name, self.begun)
            except Exception as err:
                _warn_not_registered(err)
        return spec

    def _come_first(self) -> None:
        # timm is being imported. A finder in front of this one might find timm.models without asking the others.
        if sys.meta_path[:1] != [self]:
            # In one step, because another thread may be reading the list.
            sys.meta_path[:] = [self, *(finder for finder in sys.meta_path if finder is not self)]


class _Loader:
    """Loads a module by its real loader, then calls `register`.

    All within the import lock of the module: a second thread that imports timm waits, as for any module.
    """

    _loader: Any = None  # here too, or __getattr__ would call itself for ever on an object without it (copy makes such)

    def __init__(self, loader: Any, name: str, begun: list[tuple[int, str]]) -> None:
        self._execute = loader.exec_module
        self._loader = loader
        self._name = name
        self._begun = begun

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: Any) -> None:
        try:
            module.__spec__.loader = module.__loader__ = self._loader  # what is seen of the module is as without us
        except AttributeError:  # a module that does not let itself be changed: importlib leaves it as it is, too
            pass
        this = (get_ident(), self._name)
        self._begun.append(this)
        try:
            self._execute(module)
        finally:
            self._begun.remove(this)
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
