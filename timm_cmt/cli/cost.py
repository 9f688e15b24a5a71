"""What a CMT costs: the paper's formulas (eqs. 9-16) beside what is counted, as ``timm-cmt cost`` prints it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..cmt import CMT, VARIANTS, get_grid_sizes
from .models import create_cmt
from .pictures import save_picture

__all__ = ["LEFT_OUT", "Cost", "block_formula", "count_cost", "format_costs", "plot_growth"]

LEFT_OUT = """\
n tokens of d channels, keys and values reduced k-fold on each side, IRFFN ratio R. The paper's formula for a block is
  LPU 9 n d + LMHSA (2 n d^2 (1 + 1/k^2) + 2 n^2 d/k^2) + IRFFN (2 R n d^2 + 9 R n d).
It leaves out multiply-adds that are counted here: the convolution that reduces keys and values (n d for each block
with k > 1), each stage's patch aggregation, the stem, and the last convolution and classifier ("head"). Where k does
not divide a map's sides, the map is cut, and what is counted is less. Neither has norms, activations, softmax, the
addition of the bias, and shortcuts: they are no multiply-adds, but take time and memory.
The bias is a parameter of the attention; its share is of the stage's parameters in a model built at the size.
Kept are the activations of one image in float32 that training holds for the backward pass, attention by its formula.
GPUs' fused attention keeps less."""

HEAD = ["final_conv", "global_pool", "head_drop", "head"]
PLOT_SIZES = range(224, 1345, 224)  # windows of 7 x 7 tokens of 4 to 32 pixels, Swin's, fit in all
PEERS = dict(deit_small_patch16_224="DeiT-S", swin_tiny_patch4_window7_224="Swin-T")


class Cost(NamedTuple):
    """The cost of one part of a model for one image."""

    part: str
    tokens: int | None  # of the stage's map; None for what is no stage
    formula: float | None  # multiply-adds of the stage's blocks by the paper's formula
    counted: float  # multiply-adds of convolutions and matrix products
    parameters: int
    bias: int  # parameters that are relative position biases
    kept: int  # bytes that training keeps for the backward pass, in float32


def block_formula(n: int, d: int, k: int, ratio: float = 4.0) -> float:
    """Multiply-adds of one CMT block by the paper, O(LPU) + O(LMHSA) + O(IRFFN) (eqs. 12-16).

    With the ratio 4, 10 n d^2 (1 + 0.2 / k^2) + 2 n^2 d / k^2 + 45 n d.

    Args:
        n: Tokens.
        d: Channels.
        k: Reduction of keys and values, on each side.
        ratio: R of the IRFFN, 4 in the paper's equations.
    """
    lpu = 9 * n * d
    lmhsa = 2 * n * d**2 * (1 + 1 / k**2) + 2 * n**2 * d / k**2
    irffn = 2 * ratio * n * d**2 + 9 * ratio * n * d
    return lpu + lmhsa + irffn


def count_cost(name: str, img_size: tuple[int, int]) -> list[Cost]:
    """The stem, the stages, the head and the sum of a CMT built for images of `img_size` (height, width) pixels.

    Counted on torch's "meta" device, where nothing is computed and any size fits.

    Raises:
        ValueError: A side is under 32 pixels.
    """
    with _plain_attention():
        model = create_cmt(name, img_size=img_size, device="meta").eval()
    x = torch.empty(1, 3, *img_size, device="meta")
    flops = {module.partition(".")[2]: sum(counts.values()) for module, counts in _count_flops(model, x).items()}
    kept = _count_kept(model.train(), x)

    def count(part: str, *names: str, tokens: int | None = None, formula: float | None = None) -> Cost:
        sizes = {key: p.numel() for key, p in model.named_parameters() if key.startswith(tuple(f"{n}." for n in names))}
        bias = sum(size for key, size in sizes.items() if ".rel_pos_bias." in key)
        counted = sum(flops.get(name, 0) for name in names) / 2  # torch counts additions, too
        return Cost(part, tokens, formula, counted, sum(sizes.values()), bias, sum(kept[name] for name in names))

    args, costs = VARIANTS[name], []
    for i, (height, width) in enumerate(get_grid_sizes(img_size)):
        stage: Any = model.stages[i]
        n, d, k = height * width, args["embed_dims"][i], stage.rel_pos_bias.sr_ratio
        formula = args["depths"][i] * block_formula(n, d, k, args["mlp_ratio"])
        costs.append(count(f"stage {i + 1}", f"stages.{i}", tokens=n, formula=formula))
    whole = count("all", *kept, formula=sum(cost.formula or 0 for cost in costs))
    return [count("stem", "stem"), *costs, count("head", *HEAD), whole]


def _count_flops(model: nn.Module, x: Tensor) -> dict[str, dict[Any, int]]:
    """Module -> operator -> multiplications and additions."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_flop_counts()


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Models made within have attention by its formula, which torch's counter sees in every version."""
    before = use_fused_attn()
    set_fused_attn(False)
    try:
        yield
    finally:
        set_fused_attn(before)


def _count_kept(model: CMT, x: Tensor) -> dict[str, int]:
    """Bytes that each part of the model keeps for the backward pass: each storage once, with what keeps it first."""
    kept: dict[str, int] = {}
    part = ""

    def enter(name: str, *_: Any) -> None:
        nonlocal part
        part = name

    for name in ["stem", *(f"stages.{i}" for i in range(len(model.stages))), *HEAD]:
        kept[name] = 0
        model.get_submodule(name).register_forward_pre_hook(partial(enter, name))
    storages = [tensor.untyped_storage() for tensor in [*model.parameters(), *model.buffers()]]
    seen = {id(storage): storage for storage in storages}  # they stay alive, so that no other gets one's identity

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in seen:
            seen[id(storage)] = storage
            kept[part] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return kept


def format_costs(name: str, img_size: tuple[int, int], costs: Sequence[Cost]) -> str:
    """A table of `count_cost`'s figures."""
    lines = [f"{name}, {img_size[0]} x {img_size[1]} pixels"]
    lines.append("           tokens  formula  counted  parameters  bias in it    kept")
    lines.append("                       GMACs    GMACs           M           %     MiB")
    for cost in costs:
        tokens = "" if cost.tokens is None else f"{cost.tokens:,}".replace(",", " ")
        formula = "" if cost.formula is None else f"{cost.formula / 1e9:.3f}"
        bias = f"{100 * cost.bias / cost.parameters:.1f}" if cost.bias else ""
        figures = f"{cost.counted / 1e9:9.3f}{cost.parameters / 1e6:12.3f}{bias:>12}{cost.kept / 2**20:8.1f}"
        lines.append(f"{cost.part:9}{tokens:>8}{formula:>9}{figures}")
    return "\n".join(lines)


def plot_growth(name: str, path: Path) -> None:
    """Draw how multiply-adds grow with the image's side, against DeiT-S and Swin-T counted the same way.

    Beside it, the share of them that attention's products have: the terms with n^2.
    """
    from matplotlib.figure import Figure
    from tqdm import tqdm

    counts: dict[str, list[tuple[float, float]]] = {}
    runs = [(model, size) for model in (name, *PEERS) for size in PLOT_SIZES]
    for model, size in tqdm(runs, unit="model", desc="counting"):
        counts.setdefault(model, []).append(_count_products(model, size))
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (model, pairs) in enumerate(counts.items()):
        label = PEERS.get(model, model)
        left.plot(PLOT_SIZES, [total / 1e9 for total, _ in pairs], "o-", color=f"C{i}", label=label)
        right.plot(PLOT_SIZES, [100 * product / total for total, product in pairs], "o-", color=f"C{i}", label=label)
    left.set_ylabel("multiply-adds, G")
    left.set_yscale("log")
    right.set_ylabel("of them in the products of attention (n²), %")
    for axes in (left, right):
        axes.set_xlabel("side of the image, pixels")
        axes.set_xticks(PLOT_SIZES)
        axes.grid(alpha=0.3)
        axes.legend()
    save_picture(figure, path)


def _count_products(name: str, size: int) -> tuple[float, float]:
    """Multiply-adds of a model, and those of products of two activations."""
    with _plain_attention():
        model = timm.create_model(name, img_size=size, device="meta").eval()
    counts = _count_flops(model, torch.empty(1, 3, size, size, device="meta"))["Global"]
    return sum(counts.values()) / 2, sum(value for op, value in counts.items() if "bmm" in str(op)) / 2
