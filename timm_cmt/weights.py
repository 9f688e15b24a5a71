"""Where pretrained weights come from, and that a file of them is whole before timm loads it."""

import argparse
import json
import logging
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from http.client import HTTPException
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

import safetensors
import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

__all__ = ["RELEASE_URL", "allow_arguments", "check_file", "ensure_whole", "fetch", "get_hub_id", "show_progress"]

RELEASE_URL = "https://github.com/ggjy/CMT.pytorch/releases/download/release-v1"

_logger = logging.getLogger(__name__)
_allowing = threading.RLock()
_is_progress_shown = ContextVar("is_progress_shown", default=True)


def get_hub_id(name: str) -> str | None:
    """ORG/NAME@COMMIT that the weights `name` (such as cmt_s.in1k) were published as, if they were.

    `timm-cmt publish` records that in the package's hub.json. Where TIMM_CMT_HUB_ORG is set and empty, the authors'
    release is the source all the same.
    """
    if os.environ.get("TIMM_CMT_HUB_ORG") == "":
        return None
    try:
        recorded = json.loads(files("timm_cmt").joinpath("hub.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    commit = recorded["commits"].get(name)
    return f"{recorded['org']}/{name}@{commit}" if commit else None


@contextmanager
def allow_arguments() -> Iterator[None]:
    """Let torch.load read the command line, an argparse.Namespace, that training checkpoints hold beside the weights.

    Nothing else is allowed, and only within the context.
    """
    with _allowing:  # what one thread takes back, another may need
        if argparse.Namespace in torch.serialization.get_safe_globals():
            yield  # On leaving, torch would take back what the user has allowed.
            return
        with torch.serialization.safe_globals([argparse.Namespace]):
            yield


@contextmanager
def show_progress(shown: bool) -> Iterator[None]:
    """Downloads within it, those from the Hub too, show a bar or none."""
    token = _is_progress_shown.set(shown)
    is_hub_changed = not shown and not are_progress_bars_disabled()
    if is_hub_changed:
        disable_progress_bars()
    try:
        yield
    finally:
        _is_progress_shown.reset(token)
        if is_hub_changed:
            enable_progress_bars()


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
    elif isinstance(cfg.url, str) and cfg.url and not cfg.hf_hub_id:
        fetch(cfg.url, cache_dir)


def check_file(path: str | Path) -> None:
    """Raise if there is no checkpoint at `path` that can be loaded: FileNotFoundError or RuntimeError."""
    if os.path.isdir(path):
        raise FileNotFoundError(f"{path} is a folder; name a checkpoint, which is a file")
    try:
        os.stat(path)
    except PermissionError as err:  # of a folder on the way
        raise RuntimeError(f"{path} cannot be read ({err.strerror})") from None
    except OSError:
        raise FileNotFoundError(f"there is no checkpoint at {path}") from None
    problem = _find_problem(path)
    if problem:
        raise RuntimeError(f"{path} {problem}")


def fetch(url: str, cache_dir: str | Path | None = None) -> Path:
    """The file of a URL in torch's cache, or in `cache_dir`; downloaded where it is not there, or not whole.

    Any number of processes and machines may do so at once: each downloads to a name of its own.

    Raises:
        RuntimeError: It could not be downloaded or kept, or what came is no checkpoint.
    """
    folder = Path(cache_dir or Path(torch.hub.get_dir()) / "checkpoints")
    path = folder / Path(urlparse(url).path).name  # the name under which torch.hub looks for it
    if path.exists():
        problem = _find_problem(path)
        if not problem:
            return path
        _logger.warning("%s %s. Downloading it again.", path, problem)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=folder, ignore_cleanup_errors=True) as work:
            part = Path(work) / path.name
            _logger.info("Downloading %s to %s", url, path)
            _download(url, part, path)
            os.replace(part, path)
    except OSError as err:
        if path.exists() and not _find_problem(path):  # another process was faster, and has it open (Windows)
            return path
        name, remedy = ("the folder", "name another cache_dir")
        if cache_dir is None:
            name, remedy = ("torch's cache", "set TORCH_HOME to a folder that can be")
        raise RuntimeError(f"{name} {folder} cannot be written ({err.strerror or err}); {remedy}") from None
    return path


def _download(url: str, part: Path, path: Path) -> None:
    """Download to `part`, which is to become `path`."""
    try:
        torch.hub.download_url_to_file(url, str(part), progress=_is_progress_shown.get())
    except (OSError, HTTPException) as err:
        raise RuntimeError(
            f"{url} could not be downloaded ({err}); try again, or put the file at {path} by hand"
        ) from None
    problem = _find_problem(part)
    if problem:
        raise RuntimeError(f"what came from {url} {problem}; try again, or put the file at {path} by hand")


def _find_problem(path: str | Path) -> str | None:
    """Why a checkpoint cannot be loaded, as the end of a sentence about it; None if it can."""
    try:
        with open(path, "rb") as file:
            start = file.read(40)
    except OSError as err:
        return f"cannot be read ({err.strerror})"
    if not start:
        return "is empty; write or download it again"
    is_zip = start.startswith(b"PK")  # what torch.save writes
    try:
        if str(path).endswith(".safetensors"):
            if is_zip:
                return "is not in the format of safetensors but in torch's; give it a name that ends in .pth"
            with safetensors.safe_open(str(path), framework="pt") as weights:
                weights.keys()
            return None
        with allow_arguments(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of is an error here
            loaded = torch.load(path, map_location="meta", weights_only=True)  # "meta" reads no more than it has to
        if isinstance(loaded, Mapping):
            return None
        return f"holds no state dict but a {type(loaded).__name__}; save model.state_dict()"
    except Exception as err:
        blocked = _list_blocked(path)
        if any(name.startswith(("torch.nn.", "timm.", "timm_cmt.")) for name in blocked):
            return (
                "is refused: it holds a whole model rather than its weights, and loading that could run code; "
                "where the model can be loaded, do torch.save(model.state_dict(), ...)"
            )
        if blocked:
            names = ", ".join(blocked[:3]) + (f" and {len(blocked) - 3} more" if len(blocked) > 3 else "")
            return (
                f"is refused: beside tensors it holds {names}, and loading that could run code; "
                "where it can be loaded, save its weights alone"
            )
        reason = str(err).splitlines()[0] if str(err) else type(err).__name__
        if "TorchScript" in reason:
            return "is refused: it holds a TorchScript program; save the state_dict() of the model that it was made of"
        if str(path).endswith(".safetensors") or is_zip or start.startswith(b"\x80"):  # a pickle starts so
            return f"is cut short or no checkpoint ({reason}); write or download it again"
        return f"is no checkpoint: it begins with {start.decode('ascii', 'replace').split(chr(10))[0]!r}"


def _list_blocked(path: str | Path) -> list[str]:
    """What a checkpoint holds beside tensors that torch.load refuses."""
    try:
        with allow_arguments():
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # it cannot be read that far
        return []
