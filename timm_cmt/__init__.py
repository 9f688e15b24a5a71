"""timm-cmt: the CMT models (arXiv 2107.06263) for timm.

PyTorch loads every entry point of the group ``torch.backends`` at the end of ``import torch``; ours is `register`. It
arranges that the models enter timm's registry when timm is imported, and it is all that ``import torch`` costs:
neither torch nor timm is imported here.
"""

import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cmt import CMT as CMT
    from .rel_pos_bias import resize_rel_pos_bias as resize_rel_pos_bias

__version__ = "0.1.0"
__all__ = ["CMT", "register", "resize_rel_pos_bias"]

_PUBLIC_NAMES = {"CMT": "cmt", "resize_rel_pos_bias": "rel_pos_bias"}
_is_registered = False


def register() -> None:
    """Put the models into timm's registry: as soon as timm is imported, or at once if it already has been.

    Never raises, since it runs inside ``import torch``: what goes wrong becomes one warning. Calling it again does
    nothing.
    """
    global _is_registered
    if _is_registered:
        return
    _is_registered = True
    try:
        if "timm.models" in sys.modules:
            _import_models()
        else:
            sys.meta_path.insert(0, _TimmFinder())
    except Exception as err:
        _warn_not_registered(err)


class _TimmFinder:
    """Finds timm.models as the other finders do, and has the models imported at the end of its import.

    At its end, so within the import lock of timm.models: a second thread that imports timm waits, as for any module.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "timm.models":
            return None
        finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            execute = spec.loader.exec_module

            def execute_and_import(module: Any) -> None:
                execute(module)
                _import_models()

            spec.loader.exec_module = execute_and_import
        return spec


def _import_models() -> None:
    # What cmt imports from this package must not import timm itself: were it imported first, we would come by here
    # while it is half made.
    try:
        from . import cmt  # noqa: F401  (importing it registers the models)
    except Exception as err:
        _warn_not_registered(err)


def _warn_not_registered(err: Exception) -> None:
    message = f"timm-cmt: the CMT models are not in timm's registry ({type(err).__name__}: {err})"
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    except RuntimeWarning:  # under `python -W error`: torch has to import all the same
        print(message, file=sys.stderr)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_PUBLIC_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC_NAMES})


register()
