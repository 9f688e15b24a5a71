"""Draw the relative position bias before and after resizing, as ``timm-cmt plot-bias`` does."""

from pathlib import Path

import torch
from torch import Tensor

from .cmt import CMT, get_grid_sizes
from .rel_pos_bias import resize_rel_pos_bias

__all__ = ["plot_bias"]


def plot_bias(model: CMT, img_size: tuple[int, int], path: Path) -> None:
    """Draw, for each stage and head, what the query in the middle of the image adds to every key.

    Each stage has two rows: the bias as the model holds it, and as it is for an image of `img_size` (height, width)
    pixels, in the same colours. The cross is the query.
    """
    from matplotlib.figure import Figure

    heads = max(stage.rel_pos_bias.weight.shape[0] for stage in model.stages)
    figure = Figure(figsize=(1.15 * heads + 1.2, 2.5 * len(model.stages)), layout="constrained")
    figure.suptitle(
        f"What the query at the cross adds to each key: as held, and for {img_size[0]} x {img_size[1]} pixels"
    )
    axes = figure.subplots(2 * len(model.stages), heads, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for i, (stage, new_grid) in enumerate(zip(model.stages, get_grid_sizes(img_size, len(model.stages)))):
        bias = stage.rel_pos_bias
        weight, grid = bias.weight.detach(), bias.query_size
        key_grid, new_key_grid = bias.key_size(grid), bias.key_size(new_grid)
        resized = resize_rel_pos_bias(weight, grid, key_grid, new_grid, new_key_grid)
        before, after = _middle_query(weight, grid, key_grid), _middle_query(resized, new_grid, new_key_grid)
        for head in range(len(before)):
            limit = before[head].abs().max().item() or 1.0
            for row, keys, of in ((2 * i, before, grid), (2 * i + 1, after, new_grid)):
                ax = axes[row, head]
                ax.imshow(keys[head], cmap="RdBu_r", vmin=-limit, vmax=limit, extent=(0, of[1], of[0], 0))
                ax.plot(of[1] // 2 + 0.5, of[0] // 2 + 0.5, "k+", markersize=5)
                if head == 0:
                    name = f"stage {i + 1}\n" if row % 2 == 0 else ""
                    text = f"{name}{of[0]} x {of[1]} queries\n{keys.shape[1]} x {keys.shape[2]} keys"
                    ax.text(-0.08, 0.5, text, transform=ax.transAxes, ha="right", va="center", fontsize=7)
                if row % 2 == 0:
                    ax.set_title(f"head {head + 1}", fontsize=7)
    part = path.with_name(f"{path.name}.part")
    try:
        figure.savefig(part, dpi=120, format=path.suffix.lstrip(".") or "png")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _middle_query(bias: Tensor, grid: tuple[int, int], key_grid: tuple[int, int]) -> Tensor:
    """-> [heads, Hk, Wk], the bias of the query in the middle of the grid."""
    index = grid[0] // 2 * grid[1] + grid[1] // 2
    return bias[:, index].reshape(-1, *key_grid).to(torch.float32)
