"""timm-cmt: the CMT models (arXiv 2107.06263) for timm.

PyTorch loads every entry point of the group ``torch.backends`` at the end of ``import torch``; ours is `register`. It
arranges that the models enter timm's registry when timm is imported, and the detectors torchvision's when that is. It
is all that ``import torch`` costs: neither torch nor timm nor torchvision is imported here.
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
# A package's module with a registry -> our file that registers what is ours in there when it is imported.
_FILES = {"timm.models": "cmt", "torchvision.models": "torchvision_models"}
_PACKAGES = {registry.partition(".")[0]: registry for registry in _FILES}
# The modules that have ours in their registries. A reload of this package must not forget them.
_registries: dict[str, Any] = globals().get("_registries", {})
_warned: set[str] = set()


def register() -> None:
    """Put the models into the registries: as soon as timm or torchvision is imported, or at once if it has been.

    Never raises, since it runs inside ``import torch``: what goes wrong becomes one warning. It can be called again.
    """
    try:
        finder: Any = next((finder for finder in sys.meta_path if type(finder).__module__ == __name__), None)
        if finder is None:
            finder = _Finder()
            sys.meta_path.insert(0, finder)
        begun = {name for _, name in finder.begun}
        complete = {name: sys.modules[name] for name in _FILES if sys.modules.get(name) and name not in begun}
        if any(_registries.get(name, registry) is not registry for name, registry in complete.items()):
            # A package was removed from sys.modules and imported again. Our files use the old one: import them again.
            for name in [name for name in sys.modules if name.startswith(f"{__name__}.") and name not in begun]:
                del sys.modules[name]
                globals().pop(name.rpartition(".")[2], None)
        _registries.update(complete)
        # If one of our files was imported first, and imported the package, it is half made, and what we import may need
        # it. Then its loader calls `register` once it is complete.
        if not any(thread == get_ident() and name.startswith(f"{__name__}.") for thread, name in finder.begun):
            for name in complete:
                import_module(f"{__name__}.{_FILES[name]}")
    except Exception as err:
        _warn_not_registered(err)


class _Finder:
    """Finds modules with a registry and our own files as the other finders do, and wraps the loaders that they give.

    It stays on sys.meta_path, because a package may be removed from sys.modules and imported again, and nothing else
    would tell us. It costs about a microsecond for each module that Python looks for.
    """

    def __init__(self) -> None:
        self.begun: list[tuple[int, str]] = []  # thread and name of each import that has begun and not ended
        self._asked: list[str] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        for package, registry in _PACKAGES.items():
            if name == package or (package in sys.modules and registry not in sys.modules):
                self._come_first()
        if (name not in _FILES and not name.startswith(f"{__name__}.")) or name in self._asked:
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
        # A package is being imported. A finder in front of this one might find its models without asking the others.
        if sys.meta_path[:1] != [self]:
            # In one step, because another thread may be reading the list.
            sys.meta_path[:] = [self, *(finder for finder in sys.meta_path if finder is not self)]


class _Loader:
    """Loads a module by its real loader, then calls `register`.

    All within the import lock of the module: a second thread that imports it waits, as for any module.
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
    message = f"timm-cmt: CMT models are missing from timm or torchvision ({type(err).__name__}: {err})"
    if message in _warned:  # `register` is called for each package
        return
    _warned.add(message)
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
