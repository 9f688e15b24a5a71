"""A model as it was trained: its checkpoint, and what the command line of timm's train.py in it says.

What a model is built with and how its images are prepared is looked for in this order: the options given, train.py's
arguments in the checkpoint, the shapes of the weights, timm's configuration of the model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from timm.data import create_dataset
from timm.layers import to_2tuple
from timm.models import clean_state_dict, load_model_config_from_hf, parse_model_name, split_model_name_tag
from timm.models._hub import load_model_config_from_path  # the public loader builds the model at once
from timm.utils import reparameterize_model

from ..checkpoint import from_authors_layout, get_weights
from ..cmt import CMT, VARIANTS
from ..weights import allow_arguments, check_file
from .models import create_cmt, get_cfg

__all__ = ["Checkpoint", "Setting", "build", "find_labels", "list_widths", "read_checkpoint", "resolve"]

GIVEN = "as given"
ARGS = "from the arguments of train.py in the checkpoint"
WEIGHTS = "from the shapes of the weights"
NOT_WIDTHS = {  # arguments for training alone, or that stand elsewhere in a configuration
    "drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "recompute_act", "device", "dtype",
    "img_size", "in_chans", "num_classes", "global_pool",
}  # fmt: skip


@dataclass
class Checkpoint:
    """What a file holds: weights in our layout, the name they had there, and the arguments of train.py, if any."""

    path: Path
    weights: dict[str, Any]
    kind: str = ""
    args: dict[str, Any] = field(default_factory=dict)


class Setting(NamedTuple):
    """A value, and where it is from."""

    value: Any
    source: str


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of timm's, of the authors' or of this package, the averaged weights where there are any.

    Raises:
        FileNotFoundError: There is none.
        RuntimeError: It cannot be read, or would run code.
    """
    check_file(path)
    if path.name.endswith(".safetensors"):
        loaded: Any = safetensors.torch.load_file(path)
    else:
        with allow_arguments():
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    weights = get_weights(loaded)
    kind = next((key for key, value in loaded.items() if value is weights), "")
    args = loaded.get("args")
    args = dict(args) if isinstance(args, Mapping) else dict(getattr(args, "__dict__", {}))
    if not {"model", "gp", "crop_pct", "mean", "std"} <= args.keys():  # those of another program, such as the authors'
        args = {}
    return Checkpoint(path, from_authors_layout(clean_state_dict(dict(weights))), kind, args)


def resolve(checkpoint: Checkpoint, given: Mapping[str, Any]) -> dict[str, Setting]:
    """What the model of a checkpoint is built with, and how its images are prepared.

    Args:
        checkpoint: The checkpoint.
        given: What the user says: model, model_kwargs, num_classes, img_size, gp, mean, std, crop_pct, interpolation,
            under timm's names; None or left out where they say nothing.

    Returns:
        Settings by name: model, model_kwargs, num_classes, in_chans, img_size, global_pool, mean, std, crop_pct,
        interpolation, and base, the arguments for timm.create_model that stand for the model's configuration.

    Raises:
        ValueError: Nothing says which model it is, or what is given does not fit the weights.
        RuntimeError: The model that it was trained from cannot be found any more.
    """
    args, weights = checkpoint.args, checkpoint.weights
    out: dict[str, Setting] = {}

    def take(name: str, value: Any, source: str) -> None:
        if name not in out and value is not None and value != "":
            out[name] = Setting(value, source)

    take("model", given.get("model"), GIVEN)
    take("model", args.get("model"), ARGS)
    if "model" not in out:
        raise ValueError(f"{checkpoint.path} does not say which model it is of; give --model, such as --model cmt_s")
    name, tag_or_cfg, base_args = _find_base(out["model"].value, checkpoint.path)
    if name not in VARIANTS:
        raise ValueError(
            f"{checkpoint.path} is of {name}, which is no CMT; give --model if it is one of {', '.join(VARIANTS)}"
        )
    out["model"] = Setting(name, out["model"].source)
    out["base"] = Setting(tag_or_cfg, "")
    base = create_cmt(name, pretrained_cfg=tag_or_cfg or None, device="meta")
    cfg = get_cfg(base)

    given_kwargs = given.get("model_kwargs") or {}
    model_kwargs = {**base_args, **(args.get("model_kwargs") or {}), **given_kwargs}
    out["model_kwargs"] = Setting(model_kwargs, GIVEN if given_kwargs else ARGS)

    stem, head = weights.get(f"{cfg['first_conv']}.weight"), weights.get(f"{cfg['classifier']}.weight")
    classes = 0 if head is None else len(head)
    if given.get("num_classes") not in (None, classes):
        raise ValueError(
            f"--num-classes {given['num_classes']} does not fit {checkpoint.path}, which has {classes} classes"
        )
    take("num_classes", classes, WEIGHTS)
    take("in_chans", 3 if stem is None else stem.shape[1], WEIGHTS)

    for size, source in (
        (given.get("img_size"), GIVEN),
        (given_kwargs.get("img_size"), GIVEN),
        ((args.get("input_size") or [])[1:], ARGS),
        (args.get("img_size"), ARGS),
        (model_kwargs.get("img_size"), ARGS),
        (_find_size(weights), WEIGHTS),
    ):
        take("img_size", to_2tuple(size) if size else None, source)

    rest = "the model's default, which train.py used" if args else "assumed, the model's default"
    take("global_pool", given.get("gp"), GIVEN)
    take("global_pool", given_kwargs.get("global_pool"), GIVEN)
    take("global_pool", args.get("gp"), ARGS)
    take("global_pool", model_kwargs.get("global_pool"), ARGS)
    if head is not None:
        take("global_pool", "catavgmax" if head.shape[1] == 2 * base.num_features else None, WEIGHTS)
    take("global_pool", "avg", rest)

    channels = out["in_chans"].value
    for key in ("mean", "std"):
        for values, source in ((given.get(key), GIVEN), (args.get(key), ARGS)):
            if values is not None and len(values) not in (1, channels):
                raise ValueError(f"--{key} has {len(values)} numbers for images of {channels} channels")
            take(key, tuple(values) * (channels // len(values)) if values is not None else None, source)
        if len(cfg[key]) == channels:
            take(key, tuple(cfg[key]), rest)
        else:  # as timm's loaders adapt them
            take(key, (sum(cfg[key]) / len(cfg[key]),) * channels, f"{rest}, averaged")
    for key in ("crop_pct", "interpolation"):
        take(key, given.get(key), GIVEN)
        take(key, args.get(key) or None, ARGS)
        take(key, cfg[key], rest)
    return out


def build(checkpoint: Checkpoint, settings: Mapping[str, Setting]) -> CMT:
    """The model with the checkpoint's weights; its pretrained_cfg says how its images are prepared.

    Raises:
        ValueError: The model takes no such arguments.
        RuntimeError: The weights are not of that model.
    """
    get = {name: setting.value for name, setting in settings.items()}
    model = _create(get)
    if not _fits(checkpoint.weights, model):
        _raise_misfit(checkpoint, model, get)
    try:
        model.load_state_dict(checkpoint.weights)
    except RuntimeError as err:
        raise RuntimeError(f"{checkpoint.path}: {' '.join(str(err).split())}") from None
    get_cfg(model).update({key: get[key] for key in ("mean", "std", "crop_pct", "interpolation")})
    return model


def list_widths(settings: Mapping[str, Setting]) -> dict[str, Any]:
    """The arguments that the shape of the model depends on, beside those that every model has."""
    return {key: value for key, value in settings["model_kwargs"].value.items() if key not in NOT_WIDTHS}


def find_labels(
    checkpoint: Checkpoint, num_classes: int, labels: Path | None, data_dir: Path | None
) -> tuple[list[str], str]:
    """The names of the classes, and where they are from; ([], why) where nothing tells them.

    Args:
        checkpoint: The checkpoint, whose arguments name the folder it was trained on.
        num_classes: Classes of the model.
        labels: A text file, one name a line, in the order of the classes.
        data_dir: The folder that it was trained on, whose class folders give the names in the order of training.

    Raises:
        ValueError: What was given has not as many names as the model has classes, or cannot be read.
    """
    args = checkpoint.args
    if labels is not None:
        try:
            names = labels.read_text(encoding="utf-8-sig").rstrip().splitlines()
        except (OSError, UnicodeError) as err:
            reason = err.strerror if isinstance(err, OSError) else "it is no text in UTF-8"
            raise ValueError(
                f"--labels {labels} cannot be read ({reason}); give a text file, one name a line"
            ) from None
        if len(names) != num_classes:
            raise ValueError(f"--labels {labels} has {len(names)} lines, and the model {num_classes} classes")
        return [name.strip() for name in names], GIVEN
    folder, kind = data_dir or args.get("data_dir") or args.get("data"), (args.get("dataset") or "").lower()
    if not folder or (data_dir is None and (kind or not Path(folder).is_dir())):
        is_folder = not kind or kind.startswith("torch/")  # the order of other data sets is not that of folders
        return [], f"unknown; --labels FILE{' or --data-dir FOLDER' if is_folder else ''} gives them"
    try:
        # The reader that it was trained with, since the order of its classes is the order of the weights.
        options: dict[str, Any] = dict(split=args.get("train_split") or "train", class_map=args.get("class_map") or "")
        dataset = create_dataset(kind if kind.startswith("torch/") else "", root=str(folder), **options)
        indices = (dataset if kind.startswith("torch/") else dataset.reader).class_to_idx
    except Exception as err:  # timm asserts, or raises what the file system or a class map gives
        if data_dir is not None:
            raise ValueError(f"--data-dir {data_dir} has no class folders with images ({err})") from None
        return [], f"unknown: {folder} cannot be read ({err}); --labels FILE or --data-dir FOLDER gives them"
    if sorted(indices.values()) == list(range(num_classes)):
        return sorted(indices, key=indices.__getitem__), f"the class folders in {folder}"
    count = len(set(indices.values()))  # a class map can join folders
    if data_dir is not None:
        raise ValueError(f"--data-dir {data_dir} has {count} classes, and the model {num_classes}; give --labels")
    return [], f"unknown: {folder} has {count} classes; --labels FILE gives them"


def _find_base(name: str, path: Path) -> tuple[str, Any, dict[str, Any]]:
    """What a name for timm.create_model means: architecture, timm's configuration of it or its tag, arguments."""
    source, model_id = parse_model_name(name)
    if not source:
        return (*split_model_name_tag(model_id), {})
    try:
        load = load_model_config_from_hf if source == "hf-hub" else load_model_config_from_path
        cfg, architecture, model_args = load(model_id)
    except Exception as err:  # of the file system, of the Hub, or of JSON
        reason = " ".join(str(err).split())
        raise RuntimeError(f"{path} was trained from {name}, which cannot be read ({reason}); give --model") from None
    return architecture, cfg, dict(model_args or {})


def _find_size(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width in pixels that the position bias was built for; a square where nothing tells."""
    grid, bias = (weights.get(f"stages.0.rel_pos_bias.{name}") for name in ("query_grid", "weight"))
    if grid is not None:
        height, width = (4 * int(side) for side in grid)  # the first stage lies at stride 4
        return height, width
    side = 0 if bias is None else 4 * math.isqrt(bias.shape[1])
    return (side, side) if side else None


def _create(get: Mapping[str, Any], **more: Any) -> CMT:
    names = ("num_classes", "in_chans", "img_size", "global_pool")
    kwargs = {**get["model_kwargs"], **{name: get[name] for name in names if name in get}, **more}
    try:
        return create_cmt(get["model"], pretrained_cfg=get.get("base") or None, **kwargs)
    except (TypeError, IndexError, AssertionError) as err:  # what Python says to a wrong argument
        raise ValueError(
            f"{get['model']} cannot be built as it is told ({err}); check --model-kwargs and --gp"
        ) from None


def _fits(weights: Mapping[str, Any], model: torch.nn.Module) -> bool:
    """Whether a state dict has the model's parameters, nothing else, and their shapes, at whatever image size."""
    own = model.state_dict()
    return (weights.keys() <= own.keys()) and all(
        getattr(weights.get(name), "shape", None) == own[name].shape or (name in weights and "rel_pos_bias" in name)
        for name in (*dict(model.named_parameters()), *weights)
    )


def _raise_misfit(checkpoint: Checkpoint, model: CMT, get: Mapping[str, Any]) -> None:
    """Say of which model the weights are, or what is amiss with them."""
    path, weights = checkpoint.path, checkpoint.weights
    if _fits(weights, reparameterize_model(model)):
        raise RuntimeError(f"{path} is of a reparameterized model; convert the checkpoint that this one was made from")
    for name in VARIANTS:
        if name == get["model"]:
            continue
        other = _create({**get, "model": name, "model_kwargs": {}, "base": None}, device="meta")
        if _fits(weights, other):
            raise RuntimeError(f"{path} is of {name}, not of {get['model']}; give --model {name}")
    own = model.state_dict()
    common = [name for name in own if name in weights]
    if not common:
        names = ", ".join(list(weights)[:3])
        raise RuntimeError(f"{path} is not of a CMT: none of its {len(weights)} entries ({names}, ...) is one of its")
    wrong = [
        f"{name} is {tuple(getattr(weights[name], 'shape', ()))} there and {tuple(own[name].shape)} in {get['model']}"
        for name in common
        if getattr(weights[name], "shape", None) != own[name].shape and "rel_pos_bias" not in name
    ]
    wrong += [f"it lacks {name}" for name in own if name not in weights and not name.endswith("query_grid")]
    wrong += [f"it has {name}, and the model has not" for name in weights if name not in own]
    more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    raise RuntimeError(
        f"{path} does not fit {get['model']}: {wrong[0]}{more}; "
        "if it was built with arguments of its own, give them by --model-kwargs"
    )
