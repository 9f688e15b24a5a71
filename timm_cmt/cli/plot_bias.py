"""Draw the relative position bias before and after resizing, as ``timm-cmt plot-bias`` does."""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor

from ..cmt import CMT
from .models import get_cfg
from .pictures import check_picture, save_picture

__all__ = ["plot_bias"]

COLUMNS = 8


def plot_bias(model: CMT, img_size: tuple[int, int], path: Path, weights: str = "") -> None:
    """Draw, for each stage and head, what the query in the middle of the image adds to every key.

    Above the bias as the model holds it, below as it is for an image of `img_size` (height, width) pixels, all in the
    same colours. The cross is the query.

    Args:
        model: The model; it stays as it is.
        img_size: Height and width in pixels.
        path: The picture to write, in the format that its suffix says.
        weights: Which weights these are, for the title.

    Raises:
        IsADirectoryError: `path` is a folder.
        ValueError: matplotlib has no such format.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    check_picture(path)
    resized = deepcopy(model)
    resized.set_input_size(img_size)
    held_size, new_size = (" x ".join(map(str, get_cfg(m)["input_size"][1:])) for m in (model, resized))
    heads = []
    for stage in range(len(model.stages)):
        (old_keys, old_grid), (new_keys, new_grid) = _middle_query(model, stage), _middle_query(resized, stage)
        for head in range(len(old_keys)):
            title = f"stage {stage + 1}\nhead {head + 1}"
            heads.append((title, old_keys[head], old_grid, new_keys[head], new_grid))
    outline = [withStroke(linewidth=2.5, foreground="white")]  # to be seen on dark colours too
    largest = max(keys.abs().max().item() for _, keys, *_ in heads) or 1.0
    colours = ScalarMappable(Normalize(-largest, largest), "RdBu_r")
    columns = min(COLUMNS, len(heads))
    rows = 2 * math.ceil(len(heads) / columns)
    figure = Figure(figsize=(1.15 * columns + 1.6, 1.1 * rows + 0.8), layout="constrained")
    figure.suptitle(
        f"Relative position bias{f' of {weights}' if weights else ''}: what the query at the cross adds to each key",
        fontsize=10,
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for i, (title, old_keys, old_grid, new_keys, new_grid) in enumerate(heads):
        row, column = 2 * (i // columns), i % columns
        for ax, keys, grid, size in (
            (axes[row, column], old_keys, old_grid, held_size),
            (axes[row + 1, column], new_keys, new_grid, new_size),
        ):
            extent = (0, grid[1], grid[0], 0)
            ax.imshow(keys.numpy(), cmap=colours.cmap, norm=colours.norm, extent=extent)
            ax.plot(grid[1] // 2 + 0.5, grid[0] // 2 + 0.5, "k+", markersize=5, path_effects=outline)
            if column == 0:
                which = "as held" if size == held_size and ax is axes[row, column] else "resized"
                ax.text(-0.1, 0.5, f"{which}\n{size}", transform=ax.transAxes, ha="right", va="center", fontsize=7)
        axes[row, column].set_title(title, fontsize=7)
    figure.colorbar(colours, ax=axes, shrink=0.6, label="added before the softmax")
    save_picture(figure, path)


def _middle_query(model: CMT, stage: int) -> tuple[Tensor, tuple[int, int]]:
    """-> [heads, Hk, Wk], the bias of the query in the middle of a stage's grid; and that grid."""
    part: Any = model.stages[stage]
    height, width = grid = part.rel_pos_bias.query_size
    keys = part.rel_pos_bias.weight.detach()[:, height // 2 * width + width // 2]
    return keys.reshape(-1, *part.rel_pos_bias.key_size(grid)).float(), grid
