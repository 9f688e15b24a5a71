"""The model that a command is told to use: by its name, in a folder or repository, or in a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.data import ImageNetInfo
from timm.models import parse_model_name, split_model_name_tag

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
        model = build(checkpoint, resolve(checkpoint, given))
        names, _ = find_labels(checkpoint, model.num_classes, None, None)
    else:
        if given:
            raise ValueError(f"{source} is no checkpoint, and says itself what it is; leave out --model")
        model = _create_pretrained(f"local-dir:{source}" if path.is_dir() else source)
        names = _list_names(get_cfg(model).get("label_names"))
    if not names and model.num_classes == 1000 and get_cfg(model).get("tag") == TAG:
        info = ImageNetInfo()
        names = [info.index_to_description(i) for i in range(1000)]
    return model.eval(), names if len(names) == model.num_classes else []


def _create_pretrained(source: str) -> CMT:
    kind, name = parse_model_name(source)
    if not kind:
        variant = split_model_name_tag(name)[0]
        if variant not in VARIANTS:
            raise FileNotFoundError(
                f"there is no checkpoint and no folder {source}, and no CMT of that name; "
                f"the models are {', '.join(VARIANTS)}"
            )
        if not timm.is_model_pretrained(name):
            raise ValueError(f"there are no pretrained weights of {source}; name a checkpoint or a folder of yours")
    try:
        return create_cmt(source, pretrained=True)
    except (RuntimeError, ValueError):
        raise
    except Exception as err:  # of the file system, of the Hub, or of JSON
        reason = " ".join(str(err).split())
        raise RuntimeError(f"{source} cannot be read ({reason}); `timm-cmt convert` writes such folders") from None


def _list_names(label_names: Any) -> list[str]:
    """timm takes a list, or a mapping from the index."""
    if isinstance(label_names, Mapping):
        label_names = [label_names[key] for key in sorted(label_names, key=int)]
    return [str(name) for name in label_names or ()]
