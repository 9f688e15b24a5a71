"""What a checkpoint of a CMT holds: the authors' layout, which variant it is, and whether it fits a model.

The authors' layout is that of https://github.com/ggjy/CMT.pytorch. It differs from ours in its names, and in holding
the projections of k and v apart where ours is one.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = [
    "Geometry",
    "from_authors_layout",
    "get_weights",
    "read_geometry",
    "refuse_incomplete",
    "refuse_misfit",
    "refuse_other_network",
]

# (authors' key, ours); the first match decides. {s} is the stage: a-d there, 0-3 here.
_AUTHORS_KEYS: list[tuple[str, str]] = [
    (r"stem_(conv|norm)([1-3])\.", r"stem.\1\2."),
    (r"patch_embed_{s}\.proj\.", r"stages.{s}.downsample.conv."),
    (r"patch_embed_{s}\.norm\.", r"stages.{s}.downsample.norm."),
    (r"relative_pos_{s}$", r"stages.{s}.rel_pos_bias.weight"),
    (r"blocks_{s}\.(\d+)\.proj\.", r"stages.{s}.blocks.\1.lpu.conv."),
    (r"blocks_{s}\.(\d+)\.attn\.sr\.0\.", r"stages.{s}.blocks.\1.attn.sr."),
    (r"blocks_{s}\.(\d+)\.attn\.sr\.1\.", r"stages.{s}.blocks.\1.attn.sr_norm."),
    (r"blocks_{s}\.(\d+)\.attn\.(q|k|v|proj)\.", r"stages.{s}.blocks.\1.attn.\2."),
    (r"blocks_{s}\.(\d+)\.mlp\.conv1\.0\.", r"stages.{s}.blocks.\1.mlp.conv1."),
    (r"blocks_{s}\.(\d+)\.mlp\.conv1\.2\.", r"stages.{s}.blocks.\1.mlp.norm1."),
    (r"blocks_{s}\.(\d+)\.mlp\.proj\.", r"stages.{s}.blocks.\1.mlp.dwconv."),
    (r"blocks_{s}\.(\d+)\.mlp\.proj_bn\.", r"stages.{s}.blocks.\1.mlp.norm2."),
    (r"blocks_{s}\.(\d+)\.mlp\.conv2\.0\.", r"stages.{s}.blocks.\1.mlp.conv2."),
    (r"blocks_{s}\.(\d+)\.mlp\.conv2\.1\.", r"stages.{s}.blocks.\1.mlp.norm3."),
    (r"blocks_{s}\.(\d+)\.(norm[12])\.", r"stages.{s}.blocks.\1.\2."),
    (r"_fc\.", r"conv_head.conv."),
    (r"_bn\.", r"conv_head.norm."),
    (r"head\.", r"head."),
]
_RENAMES: list[tuple["re.Pattern[str]", str]] = [
    (re.compile(pattern.replace("{s}", letter)), ours.replace("{s}", stage))
    for pattern, ours in _AUTHORS_KEYS
    for letter, stage in (zip("abcd", "0123") if "{s}" in pattern else [("", "")])
]
_ONLY_AUTHORS = re.compile(r"(stem_conv|patch_embed_[a-d]\.|relative_pos_[a-d]$|blocks_[a-d]\.|_fc\.|_bn\.)")


def get_weights(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights in a training checkpoint, as timm picks them: the averaged ones where there are any."""
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(checkpoint.get(key), Mapping):
            return checkpoint[key]
    return checkpoint


def from_authors_layout(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of the authors' layout to ours and join k and v. Another layout comes back as it is."""
    if not any(_ONLY_AUTHORS.match(key) for key in state_dict):
        return dict(state_dict)
    out: dict[str, Any] = {}
    for key, value in state_dict.items():
        pattern, ours = next((rename for rename in _RENAMES if rename[0].match(key)), (None, ""))
        out[pattern.sub(ours, key, count=1) if pattern else key] = value
    for key in [key for key in out if ".attn.k." in key]:
        key_v, key_kv = key.replace(".attn.k.", ".attn.v."), key.replace(".attn.k.", ".attn.kv.")
        if key_v in out:
            out[key_kv] = torch.cat([out.pop(key), out.pop(key_v)])
    return out


class Geometry(NamedTuple):
    """What tells the variants apart: widths in channels, depths in blocks."""

    stem_width: int
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]

    def __str__(self) -> str:
        dims, depths = ("-".join(map(str, numbers)) for numbers in (self.embed_dims, self.depths))
        return f"stem {self.stem_width}, dims {dims}, depths {depths}"


def read_geometry(state_dict: Mapping[str, Any]) -> Geometry | None:
    """The geometry of the network that a state dict in our layout comes from; None where it lacks a stage."""
    stem = state_dict.get("stem.conv1.weight")
    convs = [state_dict.get(f"stages.{i}.downsample.conv.weight") for i in range(4)]
    if stem is None or any(conv is None for conv in convs):
        return None
    blocks = {match.groups() for key in state_dict if (match := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", key))}
    depths = tuple(sum(stage == str(i) for stage, _ in blocks) for i in range(4))
    return Geometry(stem.shape[0], tuple(conv.shape[0] for conv in convs), depths)


def refuse_other_network(model: nn.Module, state_dict: Mapping[str, Any], variants: Mapping[str, Geometry]) -> None:
    """Raise if a state dict in our layout is not of this network, whatever its classes, input channels and input size.

    Args:
        model: The model to load into.
        state_dict: What is to be loaded.
        variants: The known variants, to name in the error.

    Raises:
        RuntimeError: One sentence that says what the state dict is, and what to do.
    """
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if state_dict and not own.keys() & state_dict.keys():
        first = "stem.conv1.weight"
        prefix = next((key.removesuffix(first) for key in state_dict if key.endswith(first)), None)
        if prefix:
            raise RuntimeError(f"the keys of this checkpoint begin with {prefix!r}; pass it with that taken away")
        wrapper = next((key for key in ("state_dict", "model") if isinstance(state_dict.get(key), Mapping)), None)
        if wrapper:
            raise RuntimeError(f"this is a training checkpoint, not a state dict; pass its {wrapper!r} entry")
        names = ", ".join(list(state_dict)[:3])
        raise RuntimeError(
            f"this checkpoint is not of a CMT: none of its {len(state_dict)} entries ({names}, ...) is in this model; "
            f"load one that was saved from a CMT, in this package's layout or in the authors'"
        )
    theirs, ours = read_geometry(state_dict), read_geometry(own)
    if theirs and ours and theirs != ours:
        names_by_geometry = {geometry: name for name, geometry in variants.items()}
        name = names_by_geometry.get(theirs)
        remedy = f"create the model as {name!r}" if name else "load a checkpoint of the same network"
        raise RuntimeError(
            f"this checkpoint is {name or 'another CMT'} ({theirs}) and the model is "
            f"{names_by_geometry.get(ours, 'another CMT')} ({ours}); {remedy}"
        )
    if any(".mlp.conv2." in key for key in state_dict) and _is_folded(state_dict) != _is_folded(own):
        # Everything that both have is of the same shape, and would load without `strict`.
        raise RuntimeError(
            "this checkpoint is of a reparameterized model; load it into timm.utils.reparameterize_model(model)"
            if _is_folded(state_dict)
            else "this model is reparameterized and the checkpoint is of a plain one; load it before you reparameterize"
        )


def _is_folded(names: Iterable[str]) -> bool:
    return not any(re.search(r"\.mlp\.norm[23]\.", name) for name in names)


def refuse_misfit(model: nn.Module, state_dict: Mapping[str, Any], variants: Mapping[str, Geometry]) -> None:
    """Raise if a tensor of a state dict in our layout does not fit `model`, whatever the input size.

    Args:
        model: The model to load into.
        state_dict: What is to be loaded.
        variants: The known variants, to name in the error.

    Raises:
        RuntimeError: One sentence that says what the state dict is, or which tensors do not fit, and what to do.
    """
    refuse_other_network(model, state_dict, variants)
    misfits = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        shape = getattr(state_dict.get(name, tensor), "shape", None)
        if shape != tensor.shape and ".rel_pos_bias." not in name:
            misfits.append(
                f"{name} is {'no tensor' if shape is None else tuple(shape)} there, {tuple(tensor.shape)} here"
            )
    if misfits:
        remedy = "load a checkpoint of the same network"
        if misfits[0].startswith("stem.conv1"):
            remedy = "timm.create_model(..., pretrained=True, in_chans=...) adapts weights to other input channels"
        elif misfits[0].startswith("head."):
            remedy = "timm.create_model(..., pretrained=True, num_classes=...) adapts weights to other classes"
        raise RuntimeError(f"this checkpoint does not fit the model: {_first(misfits)}; {remedy}")


def refuse_incomplete(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Raise if a state dict in our layout has not exactly the model's entries.

    The grid of a bias (the authors' layout has none) and torch's counters need not be there.

    Raises:
        RuntimeError: One sentence that names what is missing or too much, and what to do.
    """
    own = [*dict(model.named_parameters()), *dict(model.named_buffers())]
    missing = [name for name in own if name not in state_dict and not name.endswith(("query_grid", "_tracked"))]
    unexpected = [name for name in state_dict if name not in set(own)]
    for problem, names in (("lacks", missing), ("has, and the model has not,", unexpected)):
        if names:
            raise RuntimeError(f"this checkpoint {problem} {_first(names)}; pass strict=False to load the rest")


def _first(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
