"""Upload of the authors' release to the Hugging Face Hub, as ``timm-cmt publish`` does."""

import configparser
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from .. import __version__
from .cards import SPACE, TAG, write_json, write_space
from .convert import convert_release

__all__ = ["find_record", "publish"]


def find_record() -> Path | None:
    """hub.json of the checkout of this package that one stands in, or that it is imported from; None if there is none.

    An installed package is no place for it: it is gone with the next update.
    """
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).parents[2]):
        config = configparser.ConfigParser(interpolation=None)
        try:
            config.read(folder / "setup.cfg", encoding="utf-8")
        except (configparser.Error, UnicodeError):  # another project's
            continue
        if config.get("metadata", "name", fallback="") == "timm-cmt":
            return folder / "timm_cmt" / "hub.json"
    return None


def publish(
    org: str,
    model_names: Iterable[str],
    private: bool = False,
    create_pr: bool = False,
    dry_run: bool = False,
    record: Path | None = None,
    space: bool = False,
) -> None:
    """Convert the authors' release and upload it, one commit a repository: ORG/<variant>.in1k.

    What is there already is not uploaded again. At the end the organisation and the commits are recorded in a hub.json,
    from which `pretrained=True` then loads; not for pull requests, which are no part of the repository until somebody
    merges them.

    Args:
        org: The organisation or user.
        model_names: The variants.
        private: Make new repositories private.
        create_pr: Open pull requests.
        dry_run: Convert only.
        record: The hub.json; if None, what belongs into it is printed.
        space: Upload the page of ``timm-cmt app`` as well, as a Space for CMT-S or else the first variant, which the
            cards link to.

    Raises:
        FileNotFoundError: `record` is in no folder.
        ValueError: `record` is no such file.
        RuntimeError: The Hub refuses or does not answer. A repository has all of its commit or nothing of it, and
            nothing is recorded.
    """
    if record is not None and not record.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {record.parent} for --record; make it, or name another")
    recorded = _read(record)
    api = HfApi(library_name="timm-cmt", library_version=__version__)
    if not dry_run:
        _ask_hub(f"{api.endpoint} does not say who you are", api.whoami)
    with tempfile.TemporaryDirectory() as work:
        names = list(model_names)
        folders = {f"{org}/{name}.{TAG}": Path(work) / f"{name}.{TAG}" for name in names}
        for name, folder in zip(names, folders.values()):
            convert_release(name, folder, org=org, space=space)
        if space:  # last, because it loads what goes before it
            folders[f"spaces/{org}/{SPACE}"] = Path(work) / "space"
            write_space(Path(work) / "space", "cmt_s" if "cmt_s" in names else names[0], org)
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
            repo_id, kind = repo.removeprefix("spaces/"), "space" if folder.name == "space" else "model"
            sdk = "gradio" if kind == "space" else None
            _ask_hub(problem, api.create_repo, repo_id, repo_type=kind, space_sdk=sdk, private=private, exist_ok=True)
            commit = _ask_hub(
                problem,
                api.upload_folder,
                repo_id=repo_id,
                repo_type=kind,
                folder_path=folder,
                commit_message=f"Add {folder.name}",
                create_pr=create_pr,
            )
            if kind == "model":
                commits[folder.name] = commit.oid
            print(f"{repo}@{commit.oid}" + (f", {commit.pr_url}" if create_pr else ""))
    if create_pr:
        return
    if recorded["org"] == org:
        commits = {**recorded["commits"], **commits}
    recorded = {"org": org, "commits": commits}
    if record is None:
        print("There is no checkout of timm-cmt here. This belongs into its timm_cmt/hub.json:")
        print(json.dumps(recorded, indent=2))
    else:
        write_json(record, recorded)
        print(f"recorded in {record}")


def _read(record: Path | None) -> dict[str, Any]:
    """What is recorded so far."""
    if record is None or not record.exists():
        return {"org": "", "commits": {}}
    try:
        recorded = json.loads(record.read_text(encoding="utf-8"))
        return {"org": recorded["org"], "commits": dict(recorded["commits"])}
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ValueError(f'{record} is no record of {{"org": ..., "commits": ...}} ({err}); remove it') from None


def _ask_hub(problem: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return call(*args, **kwargs)
    except Exception as err:  # the base of the client's transport errors differs from version to version
        reason = next((line for line in str(err).splitlines() if line.strip()), type(err).__name__)
        raise RuntimeError(
            f"{problem}: {reason.strip()} (is ORG right, and `hf auth login` done or HF_TOKEN set for an account that "
            f"may write there? What is published already stays, and running this again goes on from it)"
        ) from None
