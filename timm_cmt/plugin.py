"""The one door to timm: its own builder and decorator, with what only a plugin has to do around them."""

import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from timm import models  # not timm.models by name: timm is half imported when this module is
from timm.layers import to_2tuple
from timm.models import PretrainedCfg, get_pretrained_cfg, is_model, model_entrypoint, resolve_pretrained_cfg
from torch import nn

from .weights import allow_arguments, ensure_whole, get_hub_id

__all__ = ["build_model_with_cfg", "register_model", "update_model_input_size"]

_Model = TypeVar("_Model", bound=nn.Module)
_SOURCES = ("source", "state_dict", "file", "url", "hf_hub_id", "hf_hub_filename")


def register_model(fn: Callable[..., Any]) -> Callable[..., Any]:
    """timm's register_model, which leaves a model of the same name alone that timm has already."""
    name = fn.__name__
    if not is_model(name):
        return models.register_model(fn)
    if model_entrypoint(name).__module__ != fn.__module__:
        warnings.warn(f"timm-cmt: timm has its own {name}, which stays; that of timm-cmt is not there", stacklevel=2)
        return fn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Overwriting", by this file, imported again
        return models.register_model(fn)


def build_model_with_cfg(
    model_cls: Callable[..., _Model],
    variant: str,
    pretrained: bool,
    pretrained_cfg: str | dict[str, Any] | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> _Model:
    """timm's build_model_with_cfg. Beside it:

    * weights come from the Hub where an organisation is recorded or TIMM_CMT_HUB_ORG names one;
    * a file is checked before timm loads it, and downloads show progress;
    * the authors' checkpoints load, which hold their command line beside the weights;
    * the model is built for the image size of its configuration, and says so where it is saved.

    Raises:
        FileNotFoundError, RuntimeError: The weights are not there, not whole, or of another network.
    """
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    if pretrained and (repository := _find_repository(variant, cfg)):
        pretrained_cfg_overlay = dict(pretrained_cfg_overlay or {}, hf_hub_id=repository)
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    channels = kwargs.get("in_chans", cfg.input_size[0])
    is_old = not hasattr(models, "get_model_input_config")  # it adapts a first convolution that fits, and cannot
    keeps_first_conv = is_old and pretrained and channels == cfg.input_size[0] != 3
    if keeps_first_conv:
        pretrained_cfg_overlay = dict(pretrained_cfg_overlay or {}, first_conv=None)
    # timm hands on the config's size only where that says it is fixed; a config saved from an instance does not.
    img_size = kwargs.setdefault("img_size", tuple(cfg.input_size[-2:]))
    # The authors' checkpoints hold arguments, and where timm loads a URL, it allows none.
    with allow_arguments() if pretrained else nullcontext():
        if pretrained:
            ensure_whole(cfg, cache_dir)
        try:
            model = models.build_model_with_cfg(
                model_cls,
                variant,
                pretrained,
                pretrained_cfg=pretrained_cfg,  # type: ignore[arg-type]  # timm takes a tag's name, too
                pretrained_cfg_overlay=pretrained_cfg_overlay,
                cache_dir=cache_dir,
                **kwargs,
            )
        except SafetensorError as err:
            raise RuntimeError(
                f"the weights in {cfg.hf_hub_id or cfg.file} are no whole safetensors file ({err}); publish them again"
            ) from err
    if keeps_first_conv:
        vars(model)["pretrained_cfg"]["first_conv"] = cfg.first_conv
    update_model_input_size(model, img_size, channels)
    return model


def update_model_input_size(model: nn.Module, img_size: int | tuple[int, int], in_chans: int) -> None:
    """Let the model's config say what input it is built for, so that what timm saves of it reloads as it is.

    The newest timm has this function in a private module, older versions have nothing of it.
    """
    height, width = map(int, to_2tuple(img_size))
    cfg = getattr(model, "pretrained_cfg", None)
    if cfg is not None:  # a model made without timm's factory has none
        cfg["input_size"] = (in_chans, height, width)
        cfg["pool_size"] = ((height + 1) // 32, (width + 1) // 32)  # the stem rounds up
    record: Any = model  # for torch, what is set on a module is a tensor or a module
    record._traits = dict(getattr(model, "_traits", {}), img_size=(height, width))
    if "img_size" in getattr(model, "_model_args", {}):
        record._model_args = dict(record._model_args, img_size=(height, width))


def _find_repository(variant: str, cfg: PretrainedCfg) -> str | None:
    """ORG/NAME on the Hub for weights that come from where the package says; None where the caller names a source."""
    name = f"{variant}.{cfg.tag}"
    registered = get_pretrained_cfg(name) if cfg.tag else None
    if not registered or not cfg.has_weights or any(getattr(cfg, s) != getattr(registered, s) for s in _SOURCES):
        return None
    org = os.environ.get("TIMM_CMT_HUB_ORG")
    return f"{org}/{name}" if org else get_hub_id(name)
