"""Checkpoints as folders that timm and transformers load, as ``timm-cmt convert`` writes them."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import parse_model_name

from ..cmt import CMT
from ..weights import fetch
from .cards import TOP1, make_card, make_config, make_plain_card, write_json
from .models import create_cmt, get_cfg
from .trained import build, find_labels, list_widths, read_checkpoint, resolve

__all__ = ["convert", "convert_release"]


def convert(
    checkpoint_path: Path,
    out: Path,
    given: Mapping[str, Any] | None = None,
    labels: Path | None = None,
    data_dir: Path | None = None,
) -> list[str]:
    """Write a folder that timm and transformers load: model.safetensors, config.json and README.md.

    The checkpoint may have any number of classes, input channels, any input size, and widths of its own. What is
    written is loaded back and compared, bit for bit, before it gets its name.

    Args:
        checkpoint_path: A checkpoint by timm's train.py, of this package or in the authors' layout.
        out: The folder to write.
        given: Where the checkpoint does not say it, or something else: model, model_kwargs, num_classes, img_size, gp,
            mean, std, crop_pct, interpolation, as in timm's scripts.
        labels: A text file with the names of the classes, one a line.
        data_dir: The ImageFolder that it was trained on, whose class folders have these names.

    Returns:
        Lines that say what was taken from where, and what was assumed.

    Raises:
        FileExistsError: `out` is there already.
        ValueError: What is given does not fit the checkpoint, or does not say enough.
        RuntimeError: The checkpoint cannot be read or is not of this model, or what was written does not load back.
    """
    _refuse_existing(out)
    checkpoint = read_checkpoint(checkpoint_path)
    settings = resolve(checkpoint, given or {})
    model = build(checkpoint, settings)
    names, source = find_labels(checkpoint, model.num_classes, labels, data_dir)
    config = make_config(model, list_widths(settings))
    for key in ("tag", "license", "origin_url", "label_names", "label_descriptions"):  # of the weights trained from
        config["pretrained_cfg"].pop(key, None)
    if names:
        config["label_names"] = names
    _write(model, out, config, make_plain_card(config))
    lines = [f"weights: {checkpoint.kind or 'all of the file'}{', averaged' if 'ema' in checkpoint.kind else ''}"]
    for name, setting in settings.items():
        if name != "base" and setting.value != {}:
            lines.append(f"{name}: {_to_text(setting.value)} ({setting.source})")
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return [*lines, f"label_names: {shown} ({source})" if names else f"label_names: {source}"]


def convert_release(model_name: str, out: Path, org: str = "", space: bool = False) -> None:
    """Write the authors' release of a variant as such a folder, with its card, for the Hub's organisation `org`, which
    has a Space for the card to link to or not.

    It is downloaded to torch's cache, whatever has been published since.

    Raises:
        FileExistsError: `out` is there already.
        RuntimeError: The release cannot be downloaded, or what was written does not load back.
    """
    _refuse_existing(out)
    if model_name not in TOP1:
        raise ValueError(f"the authors have released no weights of {model_name}; give a checkpoint of yours")
    path = fetch(get_cfg(create_cmt(model_name, device="meta"))["url"])
    model = create_cmt(model_name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    _write(model, out, make_config(model), make_card(model_name, org, space))


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise FileExistsError(f"{out} is there already; name another folder, or remove it")
    if parse_model_name(f"local-dir:{out}")[1] != str(out):  # timm 1.0.26 takes a folder for an address
        raise ValueError(f"timm {timm.__version__} cannot load from {out}; name another folder, or update timm")


def _write(model: CMT, out: Path, config: dict[str, Any], card: str) -> None:
    """Write the folder beside where it belongs, and give it its name once it is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
        part = Path(work) / out.name
        part.mkdir()
        write_json(part / "config.json", config)
        (part / "README.md").write_text(card, encoding="utf-8")
        try:
            save_file(model.state_dict(), part / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as err:
            raise RuntimeError(f"{out} could not be written ({err})") from None
        # safetensors lets nobody else read its file, whatever the umask says.
        shutil.copymode(part / "config.json", part / "model.safetensors")
        _compare(model, part)
        try:
            part.rename(out)
        except OSError:
            _refuse_existing(out)  # another process was faster
            raise


def _compare(model: CMT, folder: Path) -> None:
    loaded = create_cmt(f"local-dir:{folder}", pretrained=True)
    images = torch.randn(1, *get_cfg(model)["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        same = torch.equal(model.eval()(images), loaded.eval()(images))
    state, expected = loaded.state_dict(), model.state_dict()
    if not same or state.keys() != expected.keys() or not all(torch.equal(state[key], expected[key]) for key in state):
        raise RuntimeError(
            f"timm {timm.__version__} does not load what was written as it was, so it is removed; "
            "try a newer timm, or report this"
        )


def _to_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key}={_to_text(item).replace(' ', ',')}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(_to_text, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
