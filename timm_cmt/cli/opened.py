"""The model that a command is told to use: by its name, in a folder or repository, or in a checkpoint."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.data import ImageNetInfo
from timm.data.loader import adapt_to_chs
from timm.models import split_model_name_tag

from ..cmt import CMT, VARIANTS
from .cards import TAG
from .models import create_cmt, get_cfg
from .trained import build, find_labels, read_checkpoint, resolve

__all__ = ["open_model"]


def open_model(source: str, given: Mapping[str, Any] | None = None) -> tuple[CMT, list[str]]:
    """A model with its weights, for inference, and the names of its classes; [] where nothing tells them.

    Args:
        source: A name for timm.create_model such as cmt_s, hf-hub:ORG/NAME or local-dir:FOLDER; a folder that
            ``timm-cmt convert`` wrote; or a checkpoint's file.
        given: For a checkpoint that does not say it: model and model_kwargs.

    Raises:
        FileNotFoundError: There is nothing of that name.
        ValueError: It is no CMT, has no weights, does not say which model it is, or needs nothing of what is given.
        RuntimeError: It cannot be read.
    """
    path, given = Path(source), {key: value for key, value in (given or {}).items() if value}
    if path.is_file():
        checkpoint = read_checkpoint(path)
        settings = resolve(checkpoint, given)
        model = build(checkpoint, settings)
        names, _ = find_labels(checkpoint, model.num_classes, None, None)
        if checkpoint.args:  # a thousand classes of one's own need not be ImageNet's
            get_cfg(model).pop("tag", None)
        assumed = ", ".join(key for key, setting in settings.items() if setting.source.startswith("assumed"))
        if assumed:
            print(f"{path} does not say {assumed}; the model's defaults are taken", file=sys.stderr)
    else:
        if given:
            raise ValueError(f"{source} is no checkpoint, and says itself what it is; leave out --model")
        model = _create_pretrained(f"local-dir:{source}" if path.is_dir() else source)
        names = _list_names(get_cfg(model).get("label_names"))
    cfg = get_cfg(model)
    cfg.update({key: adapt_to_chs(cfg[key], model.in_chans) for key in ("mean", "std")})  # old timm saves three
    if not names and model.num_classes == 1000 and cfg.get("tag") == TAG:
        info = ImageNetInfo()
        names = [info.index_to_description(i) for i in range(1000)]
    return model.eval(), names if len(names) == model.num_classes else []


def _create_pretrained(source: str) -> CMT:
    if not source.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        variant = split_model_name_tag(source)[0]
        if variant not in VARIANTS:
            raise FileNotFoundError(
                f"there is no checkpoint and no folder {source}, and no CMT of that name; "
                f"the models are {', '.join(VARIANTS)}"
            )
        if not timm.is_model_pretrained(source):
            raise ValueError(f"there are no pretrained weights of {source}; name a checkpoint or a folder of yours")
    try:
        return create_cmt(source, pretrained=True)
    except Exception as err:  # of the file system, of the Hub, or of JSON
        if type(err) in (RuntimeError, ValueError):  # a sentence already
            raise
        reason = " ".join(str(err).split())
        raise RuntimeError(f"{source} cannot be read ({reason}); `timm-cmt convert` writes such folders") from None


def _list_names(label_names: Any) -> list[str]:
    """timm takes a list, or a mapping from the index."""
    if isinstance(label_names, Mapping):
        label_names = [label_names[key] for key in sorted(label_names, key=int)]
    return [str(name) for name in label_names or ()]
