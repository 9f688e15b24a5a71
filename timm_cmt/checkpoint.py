"""What a checkpoint of a CMT holds: the authors' layout, which variant it is, and whether it fits a model.

The authors' layout is that of https://github.com/ggjy/CMT.pytorch. It differs from ours in its names, and in holding
the projections of k and v apart where ours is one.
"""

import logging
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layers import ActNormConv, ConvNorm, refuse_other_kind
from .rel_pos_bias import RelPosBias

__all__ = ["Shape", "adapt", "from_authors_layout", "get_weights", "read_shape", "refuse_misfit"]

_logger = logging.getLogger(__name__)

# (authors' key, ours); the first match decides. {s} is the stage: a-d there, 0-3 here.
_AUTHORS_KEYS: list[tuple[str, str]] = [
    (r"stem_conv1\.", r"stem.conv1."),
    (r"stem_conv([23])\.", r"stem.conv\1.conv."),
    (r"stem_norm1\.", r"stem.conv2.norm."),
    (r"stem_norm2\.", r"stem.conv3.norm."),
    (r"stem_norm3\.", r"stem.norm."),
    (r"patch_embed_{s}\.proj\.", r"stages.{s}.downsample.conv."),
    (r"patch_embed_{s}\.norm\.", r"stages.{s}.downsample.norm."),
    (r"relative_pos_{s}$", r"stages.{s}.rel_pos_bias.weight"),
    (r"blocks_{s}\.(\d+)\.proj\.", r"stages.{s}.blocks.\1.lpu.conv."),
    (r"blocks_{s}\.(\d+)\.attn\.sr\.0\.", r"stages.{s}.blocks.\1.attn.sr.conv."),
    (r"blocks_{s}\.(\d+)\.attn\.sr\.1\.", r"stages.{s}.blocks.\1.attn.sr.norm."),
    (r"blocks_{s}\.(\d+)\.attn\.(q|k|v|proj)\.", r"stages.{s}.blocks.\1.attn.\2."),
    (r"blocks_{s}\.(\d+)\.mlp\.conv1\.0\.", r"stages.{s}.blocks.\1.mlp.conv1."),
    (r"blocks_{s}\.(\d+)\.mlp\.conv1\.2\.", r"stages.{s}.blocks.\1.mlp.dwconv.norm."),
    (r"blocks_{s}\.(\d+)\.mlp\.proj\.", r"stages.{s}.blocks.\1.mlp.dwconv.conv."),
    (r"blocks_{s}\.(\d+)\.mlp\.proj_bn\.", r"stages.{s}.blocks.\1.mlp.conv2.norm."),
    (r"blocks_{s}\.(\d+)\.mlp\.conv2\.0\.", r"stages.{s}.blocks.\1.mlp.conv2.conv."),
    (r"blocks_{s}\.(\d+)\.mlp\.conv2\.1\.", r"stages.{s}.blocks.\1.mlp.norm."),
    (r"blocks_{s}\.(\d+)\.(norm[12])\.", r"stages.{s}.blocks.\1.\2."),
    (r"_fc\.", r"final_conv.0.conv."),
    (r"_bn\.", r"final_conv.0.norm."),
    (r"head\.", r"head."),
]
_RENAMES: list[tuple["re.Pattern[str]", str]] = [
    (re.compile(pattern.replace("{s}", letter)), ours.replace("{s}", stage))
    for pattern, ours in _AUTHORS_KEYS
    for letter, stage in (zip("abcd", "0123") if "{s}" in pattern else [("", "")])
]
_ONLY_AUTHORS = re.compile(r"(stem_conv|patch_embed_[a-d]\.|relative_pos_[a-d]$|blocks_[a-d]\.|_fc\.|_bn\.)")

# The layers that tell the kinds of CMT apart (see `timm_cmt.ablation`), by names that stay the same when a model is
# reparameterized.
_LAYERS = re.compile(
    r"(?:stages\.\d+\.blocks\.\d+\.)?"
    r"(stem\.conv2|lpu\.dwconv|lpu|mlp\.(?!norm)\w+|(?:stem\.norm|norm1)\.running_mean)(?:\.|$)"
)
_FINAL = re.compile(r"final_conv\.(\w+)")


def get_weights(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights in a training checkpoint, as timm picks them: the averaged ones where there are any."""
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(checkpoint.get(key), Mapping):
            return checkpoint[key]
    return checkpoint


def from_authors_layout(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of the authors' layout to ours, join k and v, and say that grids are square, as theirs are.

    Another layout comes back as it is.
    """
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
    for key in [key for key in out if key.endswith(".rel_pos_bias.weight")]:
        side = math.isqrt(out[key].shape[1])
        out[key.removesuffix("weight") + "query_grid"] = torch.tensor([side, side], device=out[key].device)
    return out


class Shape(NamedTuple):
    """What tells the variants apart: widths in channels, depths in blocks, and layers by their names."""

    stem_width: int
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    layers: tuple[str, ...] = ("lpu", "mlp.conv1", "mlp.conv2", "mlp.dwconv", "stem.conv2", "stem.norm.running_mean")
    final: str = "0"  # what stands first in `final_conv`; '' for feature extractors, which lack it

    def can_be_of(self, whole: "Shape") -> bool:
        """Can a state dict of this shape, of which layers may be missing, be of a network of that one?"""
        has_other_final = self.final != whole.final and "" not in (self.final, whole.final)
        return self[:3] == whole[:3] and set(self.layers) <= set(whole.layers) and not has_other_final

    def __str__(self) -> str:
        dims, depths = ("-".join(map(str, numbers)) for numbers in (self.embed_dims, self.depths))
        layers = "" if self.layers == Shape._field_defaults["layers"] else f", layers {' '.join(self.layers)}"
        return f"stem {self.stem_width}, dims {dims}, depths {depths}{layers}"


def read_shape(state_dict: Mapping[str, Any]) -> Shape | None:
    """The shape of the network that a state dict in our layout comes from; None where it lacks a stage."""
    stem = state_dict.get("stem.conv1.weight")
    norms: list[Any] = [state_dict.get(f"stages.{i}.blocks.0.norm1.weight") for i in range(4)]
    if stem is None or any(norm is None for norm in norms):
        return None
    blocks = {match.groups() for key in state_dict if (match := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", key))}
    depths = tuple(sum(stage == str(i) for stage, _ in blocks) for i in range(4))
    layers = tuple(sorted({match[1] for match in map(_LAYERS.match, state_dict) if match}))
    final = next((match[1] for match in map(_FINAL.match, state_dict) if match), "")
    return Shape(stem.shape[0], tuple(norm.shape[0] for norm in norms), depths, layers, final)


def adapt(
    state_dict: Mapping[str, Any], model: nn.Module, variants: Mapping[str, Shape], is_whole: bool = True
) -> dict[str, Any]:
    """What `model` can load: a state dict of ours or of the authors', with the model's names and image size.

    Args:
        state_dict: What is to be loaded.
        model: A CMT, or timm's feature extractor of one, whose stages have other names.
        variants: The known variants, to name in the error.
        is_whole: The dict is the model's alone, and no part of a larger one.

    Raises:
        RuntimeError: It is of another network. One sentence says what it is, and what to do.
    """
    own = {_common_name(name): name for name in _named_tensors(model)}
    names_to_return = {_common_name(name): name for name in state_dict} | own
    tensors = from_authors_layout({_common_name(name): tensor for name, tensor in state_dict.items()})
    if is_whole and tensors and not own.keys() & tensors.keys():
        raise RuntimeError(_describe_other(tensors))
    theirs, ours = read_shape(tensors), read_shape({_common_name(k): v for k, v in _named_tensors(model).items()})
    if theirs and ours and not theirs.can_be_of(ours):
        names = {shape: name for name, shape in variants.items()}
        their_name, our_name = (names.get(s) or names.get(s._replace(final="0")) for s in (theirs, ours))
        remedy = f"create the model as {their_name!r}" if their_name else "load one of the same network"
        raise RuntimeError(
            f"this checkpoint is {their_name or 'another CMT'} ({theirs}) and the model is "
            f"{our_name or 'another CMT'} ({ours}); {remedy}"
        )
    for name, module in model.named_modules():
        if isinstance(module, (ActNormConv, ConvNorm)):  # here too, before anything is copied
            refuse_other_kind(module, tensors, _common_name(f"{name}."))
        elif isinstance(module, RelPosBias):
            old = module.resize_in(tensors, _common_name(f"{name}."))
            if old not in (None, module.query_size) and _common_name(name).startswith("stages.0."):
                sides = [4 * side for side in (*old, *module.query_size)]  # the first stage lies at stride 4
                _logger.info("Resized the relative position bias from %d x %d to %d x %d pixels", *sides)
    return {names_to_return.get(name, name): tensor for name, tensor in tensors.items()}


def refuse_misfit(state_dict: Mapping[str, Any], model: nn.Module) -> None:
    """Raise if a tensor of an adapted state dict has not the shape that it has in `model`.

    Raises:
        RuntimeError: One sentence that says which tensors do not fit, and what to do.
    """
    misfits = []
    for name, tensor in _named_tensors(model).items():
        shape = getattr(state_dict.get(name, tensor), "shape", None)
        if shape != tensor.shape:
            misfits.append(
                f"{name} is {'no tensor' if shape is None else tuple(shape)} there, {tuple(tensor.shape)} here"
            )
    if misfits:
        remedy = "load a checkpoint of the same network"
        if misfits[0].startswith("stem.conv1"):
            remedy = "timm.create_model(..., pretrained=True, in_chans=...) adapts weights to other input channels"
        elif misfits[0].startswith("head."):
            remedy = "timm.create_model(..., pretrained=True, num_classes=...) adapts weights to other classes"
        more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise RuntimeError(f"this checkpoint does not fit the model: {', '.join(misfits[:3])}{more}; {remedy}")


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    # A block may stand in two places.
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def _common_name(name: str) -> str:
    """A tensor's name in CMT, from its name in a feature extractor of timm's: stages_0.x, model.stages.0.x, body.x."""
    return re.sub(
        r"^(?:model\.|body\.|graph_module\.)?(?:stages_(\d+)\.)?", lambda m: f"stages.{m[1]}." if m[1] else "", name
    )


def _describe_other(tensors: Mapping[str, Any]) -> str:
    """Why a state dict that shares no name with the model is not one of it."""
    first = re.compile(r"(.+)stem[._]conv1\.weight$")  # in our layout or the authors'
    prefix = next((match[1] for match in map(first.match, tensors) if match), None)
    if prefix:
        return f"the keys of this checkpoint begin with {prefix!r}; pass it with that taken away"
    wrapper = next((key for key in ("state_dict", "model") if isinstance(tensors.get(key), Mapping)), None)
    if wrapper:
        return f"this is a training checkpoint, not a state dict; pass its {wrapper!r} entry"
    return (
        f"this checkpoint is not of a CMT: none of its {len(tensors)} entries ({', '.join(list(tensors)[:3])}, ...) is "
        f"in this model; load one that was saved from a CMT, in this package's layout or in the authors'"
    )
