"""Where pretrained weights come from, and that a file of them is whole before timm loads it."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

import safetensors
import torch

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

__all__ = ["HUB_FILE", "RELEASE_URL", "check_file", "ensure_whole", "get_hub_id"]

RELEASE_URL = "https://github.com/ggjy/CMT.pytorch/releases/download/release-v1"

# The organisation and the commits that `timm-cmt publish` has recorded; empty as shipped.
HUB_FILE = Path(__file__).with_name("hub.json")

_logger = logging.getLogger(__name__)


def get_hub_id(name: str) -> str | None:
    """ORG/NAME@COMMIT that the weights `name` (such as cmt_s.in1k) were published as, if they were."""
    recorded = json.loads(HUB_FILE.read_text(encoding="utf-8"))
    commit = recorded["commits"].get(name)
    return f"{recorded['org']}/{name}@{commit}" if commit else None


def ensure_whole(cfg: "PretrainedCfg", cache_dir: str | Path | None = None) -> None:
    """Check the weights that `cfg` leads timm to, downloading them first where it names a URL.

    timm would download too, but without a progress bar, and torch.hub keeps a download that was cut short as if it were
    whole. A broken file in the cache is named in a warning and fetched again. Sources that timm checks itself (the Hub,
    a directory, a state dict) are left to it.

    Raises:
        FileNotFoundError: `cfg` names a file that is not there.
        RuntimeError: The file is broken or no checkpoint, would run code, or could not be downloaded.
    """
    if cfg.source in ("hf-hub", "local-dir") or cfg.state_dict:
        return
    if cfg.file:
        check_file(cfg.file)
    elif cfg.url and not cfg.hf_hub_id:
        _download(cfg.url, Path(cache_dir or Path(torch.hub.get_dir()) / "checkpoints"))


def check_file(path: str | Path) -> None:
    """Raise if there is no checkpoint at `path` that can be loaded: FileNotFoundError or RuntimeError."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    problem = _find_problem(path)
    if problem:
        raise RuntimeError(f"{path} {problem}")


def _download(url: str, folder: Path) -> None:
    path = folder / Path(urlparse(url).path).name  # the name under which torch.hub looks for it
    if path.exists():
        problem = _find_problem(path)
        if not problem:
            return
        _logger.warning("%s %s. Downloading it again.", path, problem)
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        _logger.info("Downloading %s to %s", url, path)
        torch.hub.download_url_to_file(url, str(part), progress=True)
        problem = _find_problem(part)
        if problem:
            raise RuntimeError(f"what came from {url} {problem}")
        os.replace(part, path)
    except OSError as err:
        raise RuntimeError(
            f"{url} could not be downloaded to {folder} ({err}); "
            f"put the file there by hand, or pass pretrained_cfg_overlay=dict(file=...)"
        ) from err
    finally:
        part.unlink(missing_ok=True)


def _find_problem(path: str | Path) -> str | None:
    """Why a checkpoint cannot be loaded, as the end of a sentence about it; None if it can."""
    try:
        if str(path).endswith(".safetensors"):
            with safetensors.safe_open(str(path), framework="pt") as file:
                file.keys()
        else:
            loaded = torch.load(path, map_location="meta", weights_only=True)  # "meta" reads no more than it has to
            if not isinstance(loaded, Mapping):
                return f"holds no state dict but a {type(loaded).__name__}"
    except Exception as err:
        try:
            blocked = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        except Exception:
            blocked = []
        if blocked:
            return f"is refused: beside tensors it holds {', '.join(blocked)}, and loading that could run code"
        reason = str(err).splitlines()[0] if str(err) else type(err).__name__
        return f"is cut short or no checkpoint ({reason})"
    return None
