"""The configuration and the model card that lie beside the weights in a folder or a repository of the Hub."""

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, ModelCardData, SpaceCardData
from timm.models import PretrainedCfg, filter_pretrained_cfg
from torch.utils.flop_counter import FlopCounterMode

from .. import __version__
from ..cmt import CMT
from .models import create_cmt, get_cfg

__all__ = [
    "SPACE",
    "TAG",
    "TOP1",
    "make_card",
    "make_config",
    "make_plain_card",
    "write_hub_configs",
    "write_json",
    "write_space",
]

TAG = "in1k"
SPACE = "cmt"  # its name in the organisation
GRADIO = "6.31.0"  # the version that the page has been tried with
TOP1 = dict(cmt_ti=79.2, cmt_xs=81.8, cmt_s=83.5, cmt_b=84.5)  # in percent, the paper's
TOP1_NOTES = dict(cmt_ti=" after 1000 epochs; the page of this checkpoint says 79.0")


def make_config(model: CMT, model_args: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What timm's save_for_hf writes into config.json, whatever the version of timm.

    Newer versions write every argument into model_args, which transformers' timm wrapper refuses. Here are only those
    that the variant alone does not tell, since that wrapper looks nowhere else for them.

    Args:
        model: The model.
        model_args: Such arguments beside the image's size and channels and the pooling, which the model itself knows.
    """
    cfg = filter_pretrained_cfg(get_cfg(model), remove_source=True, remove_null=True)
    cfg["num_classes"] = model.num_classes
    own_channels, *own_size = _get_default_cfg(cfg["architecture"]).input_size
    channels, *img_size = cfg["input_size"]
    global_pool = model.global_pool.pool_type
    args = dict(model_args or {})
    if img_size != own_size:
        args["img_size"] = img_size
    if channels != own_channels:
        args["in_chans"] = channels
    if global_pool != "avg":
        args["global_pool"] = global_pool
    return {
        **({"model_args": args} if args else {}),
        "architecture": cfg.pop("architecture"),
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": global_pool,
        "pretrained_cfg": cfg,
    }


def make_card(model_name: str, org: str = "", space: bool = False) -> str:
    """The card of the authors' weights of a variant, for its repository of `org` where one is named, whose Space it
    links to if there is one.
    """
    name = f"{model_name}.{TAG}"
    cfg = _get_default_cfg(name)
    size = cfg.input_size[-1]
    model = create_cmt(model_name, device="meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *cfg.input_size, device="meta"))
    metadata = ModelCardData(
        license=cfg.license,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "transformers"],
        datasets=["imagenet-1k"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type="imagenet-1k",
                dataset_name="ImageNet-1k",
                dataset_split="validation",
                metric_type="accuracy",
                metric_name="Top-1, as reported by the authors",
                metric_value=TOP1[model_name],
                verified=False,
                source_name=cfg.paper_name,
                source_url="https://arxiv.org/abs/2107.06263",
            )
        ],
    )
    template = files(__package__).joinpath("model_card.md").read_text(encoding="utf-8")
    body = Template(template).substitute(
        name=name,
        source=f"hf-hub:{org}/{name}" if org else name,
        repo=f"{org or 'ORG'}/{name}",
        space=f", and is [here](https://huggingface.co/spaces/{org}/{SPACE}) without it" if space else "",
        size=size,
        parameters=f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}",
        gmacs=f"{counter.get_total_flops() / 2e9:.2f}",
        top1=TOP1[model_name],
        top1_note=TOP1_NOTES.get(model_name, ""),
    )
    return f"---\n{metadata.to_yaml()}\n---\n{body}"


def make_plain_card(config: Mapping[str, Any]) -> str:
    """A card for weights of which nothing but their configuration is known."""
    cfg = config["pretrained_cfg"]
    tags = ["image-classification", "timm"]
    metadata = ModelCardData(library_name="timm", pipeline_tag="image-classification", tags=tags)
    size = " x ".join(map(str, cfg["input_size"][1:]))
    return (
        f"---\n{metadata.to_yaml()}\n---\n# {config['architecture']}\n\n"
        f"A CMT for {config['num_classes']} classes at {size} pixels. To load it, `pip install timm-cmt`, then\n"
        f'`timm.create_model("hf-hub:ORG/NAME", pretrained=True)`.\n'
    )


def write_space(folder: Path, model_name: str = "cmt_s", org: str = "") -> None:
    """Write a Space of the Hub: the page of ``timm-cmt app`` for the authors' weights of a variant, which it loads from
    the repository of `org` where one is named.
    """
    name = f"{model_name}.{TAG}"
    metadata = SpaceCardData(
        title="CMT",
        sdk="gradio",
        sdk_version=GRADIO,
        python_version="3.12",
        app_file="app.py",
        license="apache-2.0",
        models=[f"{org or 'ORG'}/{name}"],
    )
    source = f"hf-hub:{org}/{name}" if org else name
    texts = {
        "README.md": f"---\n{metadata.to_yaml()}\n---\n# What is in the picture?\n\n`timm-cmt app` of "
        "[timm-cmt](https://pypi.org/project/timm-cmt), as a Space of the Hugging Face Hub.\n",
        "app.py": '"""The page of `timm-cmt app`, for all who can reach this machine."""\n\n'
        "from timm_cmt.cli import main\n\n"
        f'raise SystemExit(main(["app", "{source}", "--host", "0.0.0.0"]))\n',
        # Spaces have no GPU unless one is paid for, and torch for CUDA takes 5 GB.
        "requirements.txt": f"--extra-index-url https://download.pytorch.org/whl/cpu\ntimm-cmt[app]=={__version__}\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")


def write_hub_configs(folder: Path) -> list[Path]:
    """Write config.json and README.md of each variant with weights to folder/<variant>.in1k, and the Space's files to
    folder/space; returns those folders.
    """
    folders = []
    for model_name in TOP1:
        target = folder / f"{model_name}.{TAG}"
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / "config.json", make_config(create_cmt(model_name, device="meta")))
        (target / "README.md").write_text(make_card(model_name), encoding="utf-8")
        folders.append(target)
    write_space(folder / "space")
    return [*folders, folder / "space"]


def write_json(path: Path, data: Any) -> None:
    """Write `data` to `path`, all of it or nothing."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def _get_default_cfg(name: str) -> PretrainedCfg:
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None:
        raise ValueError(f"timm has no configuration of {name}")
    return cfg
