"""Pictures that commands write, in the format that the file's suffix says."""

from pathlib import Path
from typing import Any

__all__ = ["check_picture", "save_picture"]


def check_picture(path: Path) -> None:
    """Raise if no picture can be written to `path`, before the work that it takes.

    Raises:
        IsADirectoryError: `path` is a folder.
        ValueError: matplotlib has no such format.
    """
    from matplotlib.figure import Figure

    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the picture to write, such as {path / 'picture.png'}")
    if _get_format(path).lower() not in Figure().canvas.get_supported_filetypes():
        raise ValueError(f"{path}: matplotlib writes no {path.suffix}; name the picture .png, .pdf or .svg")


def save_picture(figure: Any, path: Path) -> None:
    """Write matplotlib's `figure`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, dpi=120, format=_get_format(path))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _get_format(path: Path) -> str:
    return path.suffix.lstrip(".") or "png"
