"""Hugging Face Hub repositories of the models: their configuration and card, conversion, and publication."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from string import Template
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, HfApi, ModelCardData
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import filter_pretrained_cfg, load_state_dict
from torch.utils.flop_counter import FlopCounterMode

from . import __version__
from .checkpoint import from_authors_layout
from .cmt import CMT
from .weights import HUB_FILE, check_file

__all__ = ["convert", "make_card", "make_config", "publish", "write_hub_configs"]

TAG = "in1k"
TOP1 = dict(cmt_ti=79.2, cmt_xs=81.8, cmt_s=83.5, cmt_b=84.5)  # in percent, the paper's
TOP1_NOTES = dict(cmt_ti=" after 1000 epochs; the page of this checkpoint says 79.0")
_TEMPLATE = Path(__file__).with_name("model_card.md")


def make_config(model: CMT) -> dict[str, Any]:
    """What timm's save_for_hf writes into config.json, whatever the version of timm.

    Without the model_args of newer versions, which transformers' timm wrapper refuses: the pretrained_cfg has it all. A
    size other than the variant's own is the exception, since that wrapper looks nowhere else for it.
    """
    cfg = filter_pretrained_cfg(model.pretrained_cfg, remove_source=True, remove_null=True)
    cfg["num_classes"] = model.num_classes
    own_size = timm.get_pretrained_cfg(cfg["architecture"]).input_size[1:]
    img_size = tuple(cfg["input_size"][1:])
    return {
        **({"model_args": {"img_size": img_size}} if img_size != own_size else {}),
        "architecture": cfg.pop("architecture"),
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": model.global_pool.pool_type,
        "pretrained_cfg": cfg,
    }


def make_card(model_name: str, org: str = "") -> str:
    """The card of the authors' weights of a variant, for its repository of `org` where one is named."""
    name = f"{model_name}.{TAG}"
    cfg = timm.get_pretrained_cfg(name)
    size = cfg.input_size[-1]
    model = timm.create_model(model_name, device="meta").eval()
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
    body = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=name,
        source=f"hf-hub:{org}/{name}" if org else name,
        repo=f"{org or 'ORG'}/{name}",
        size=size,
        parameters=f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}",
        gmacs=f"{counter.get_total_flops() / 2e9:.2f}",
        top1=TOP1[model_name],
        top1_note=TOP1_NOTES.get(model_name, ""),
    )
    return f"---\n{metadata.to_yaml()}\n---\n{body}"


def _make_plain_card(config: dict[str, Any]) -> str:
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


def write_hub_configs(folder: Path) -> list[Path]:
    """Write config.json and README.md of each variant with weights to folder/<variant>.in1k; returns those folders."""
    folders = []
    for model_name in TOP1:
        target = folder / f"{model_name}.{TAG}"
        target.mkdir(parents=True, exist_ok=True)
        _write_json(target / "config.json", make_config(timm.create_model(model_name, device="meta")))
        (target / "README.md").write_text(make_card(model_name), encoding="utf-8")
        folders.append(target)
    return folders


def convert(model_name: str, out: Path, checkpoint: Path | None = None, org: str = "") -> None:
    """Write a folder that timm and transformers load: model.safetensors, config.json and README.md.

    Without a checkpoint the authors' release is downloaded. A checkpoint may have any number of classes, input channels
    and any input size. What is written is loaded back and compared, bit for bit, before it gets its name.

    Raises:
        FileExistsError: `out` is there already.
        RuntimeError: The checkpoint cannot be read or is not of this model, or what was written does not load back.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already; name another folder, or remove it")
    if checkpoint is None:
        model = timm.create_model(model_name, pretrained=True)
    else:
        model = _load(model_name, checkpoint)
    config = make_config(model)
    is_release = config == make_config(timm.create_model(model_name, device="meta")) and model_name in TOP1
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        save_file(model.state_dict(), part / "model.safetensors", metadata={"format": "pt"})
        _write_json(part / "config.json", config)
        (part / "README.md").write_text(
            make_card(model_name, org) if is_release else _make_plain_card(config), encoding="utf-8"
        )
        _compare(model, part)
        part.chmod(0o755)
        part.rename(out)
    except SafetensorError as err:
        raise RuntimeError(f"{out} could not be written ({err})") from err
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _load(model_name: str, checkpoint: Path) -> CMT:
    check_file(checkpoint)
    state_dict = from_authors_layout(load_state_dict(str(checkpoint)))
    stem, head, grid = (
        state_dict.get(key) for key in ("stem.conv1.weight", "head.weight", "stages.0.rel_pos_bias.query_grid")
    )
    options: dict[str, Any] = {}
    if stem is not None:
        options = dict(in_chans=stem.shape[1], num_classes=0 if head is None else len(head))
    if grid is not None:
        options["img_size"] = tuple(4 * int(side) for side in grid)  # the first stage lies at stride 4
    elif (bias := state_dict.get("stages.0.rel_pos_bias.weight")) is not None:
        options["img_size"] = 4 * round(bias.shape[1] ** 0.5)
    model = timm.create_model(model_name, **options)
    model.load_state_dict(state_dict)
    return model


def _compare(model: CMT, folder: Path) -> None:
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    images = torch.randn(1, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        same = torch.equal(model.eval()(images), loaded.eval()(images))
    state, expected = loaded.state_dict(), model.state_dict()
    if not same or state.keys() != expected.keys() or not all(torch.equal(state[key], expected[key]) for key in state):
        raise RuntimeError(f"what was written does not load back as it was; {folder} is removed")


def publish(
    org: str, model_names: Iterable[str], private: bool = False, create_pr: bool = False, dry_run: bool = False
) -> None:
    """Convert the authors' release and upload it, one commit a repository: ORG/<variant>.in1k.

    What is there already is not uploaded again. At the end the organisation and the commits are recorded in the
    package's hub.json, which `pretrained=True` then loads from; not for pull requests, which are no part of the
    repository until somebody merges them.

    Raises:
        RuntimeError: The Hub refuses or does not answer. A repository has all of its commit or nothing of it, and
            nothing is recorded.
    """
    api = HfApi(library_name="timm-cmt", library_version=__version__)
    if not dry_run:
        _ask_hub(f"{api.endpoint} does not say who you are", api.whoami)
    with tempfile.TemporaryDirectory() as work:
        folders = {f"{org}/{name}.{TAG}": Path(work) / f"{name}.{TAG}" for name in model_names}
        for folder in folders.values():
            convert(folder.name.removesuffix(f".{TAG}"), folder, org=org)
        for repo, folder in folders.items():
            print(repo)
            for path in sorted(folder.iterdir()):
                print(f"  {path.name:<20} {path.stat().st_size / 1e6:8.1f} MB")
        if dry_run:
            print("nothing is uploaded (--dry-run)")
            return
        commits = {}
        for repo, folder in folders.items():
            problem = f"{repo} is not published"
            _ask_hub(problem, api.create_repo, repo, private=private, exist_ok=True)
            commit = _ask_hub(
                problem,
                api.upload_folder,
                repo_id=repo,
                folder_path=folder,
                commit_message=f"Add {folder.name}",
                create_pr=create_pr,
            )
            commits[folder.name] = commit.oid
            print(f"{repo}@{commit.oid}" + (f", {commit.pr_url}" if create_pr else ""))
    if not create_pr:
        recorded = json.loads(HUB_FILE.read_text(encoding="utf-8"))
        if recorded["org"] == org:
            commits = {**recorded["commits"], **commits}
        _write_json(HUB_FILE, {"org": org, "commits": commits})
        print(f"recorded in {HUB_FILE}")


def _ask_hub(problem: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return call(*args, **kwargs)
    except Exception as err:  # the base of the client's transport errors differs from version to version
        reason = next((line for line in str(err).splitlines() if line.strip()), type(err).__name__)
        raise RuntimeError(
            f"{problem}: {reason.strip()} (is ORG right, and `hf auth login` done or HF_TOKEN set for an account that "
            f"may write there? What is published already stays, and running this again goes on from it)"
        ) from err


def _write_json(path: Path, data: Any) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
