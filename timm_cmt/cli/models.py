"""timm.create_model and what it leaves in a model, with types."""

from typing import Any

import timm
from torch import nn

from ..cmt import CMT

__all__ = ["create_cmt", "get_cfg", "refuse_without_weights"]


def create_cmt(name: str, **kwargs: Any) -> CMT:
    """timm.create_model of a CMT.

    Raises:
        ValueError: The name is of another network.
    """
    model = timm.create_model(name, **kwargs)
    if not isinstance(model, CMT):
        raise ValueError(f"{name} is no CMT but a {type(model).__name__}")
    return model


def get_cfg(model: nn.Module) -> dict[str, Any]:
    """The configuration that timm's factory gives a model; to change it is to change the model's."""
    return vars(model)["pretrained_cfg"]


def refuse_without_weights(name: str) -> None:
    """Raise ValueError if there are no pretrained weights of a variant."""
    if not timm.is_model_pretrained(name):
        raise ValueError(f"there are no pretrained weights of {name}; leave out --pretrained")
