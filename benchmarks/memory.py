"""What an evaluation takes, and a training step: plain, with recompute_act, and with timm's gradient checkpointing.

Kept is what a forward pass holds for its backward pass. The peak is that of the first step over what was there before:
without the parameters, with the gradients. On the CPU each step has a process of its own, and Linux tells the peak.
Run: python benchmarks/memory.py [--models authors:cmt_s cmt_s ...] [--authors path/to/cmt.py] [--batch-size 2]
"""

import argparse
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from throughput import AUTHORS, DTYPES, describe, make_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from timm_cmt.cmt import VARIANTS

WAYS = ["evaluation", "training", "recompute_act", "checkpointing"]


class Storages(TorchDispatchMode):
    """What the operators that run in it have made: address -> bytes of what is still there."""

    def __init__(self):
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self) -> dict[int, int]:
        return {address: size for address, (storage, size) in self.made.items() if not storage.expired()}


def find_saved(model: nn.Module, *inputs: Any) -> dict[int, int]:
    """What a forward pass keeps for the backward pass, without parameters and buffers: a storage's address -> bytes.

    That is what autograd saves, and what else is there when the pass has ended: a checkpoint keeps by itself what it
    does not compute twice.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved, kept = {}, []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)  # so that no address is given to another
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Storages() as storages:
        out = model(*inputs)  # noqa: F841 (the graph is there as long as this)
    return {address: size for address, size in {**saved, **storages.alive()}.items() if address not in own}


def measure(name: str, way: str, authors: Path | None, batch: int, dtype: str, device: str) -> tuple[float, float]:
    """MB kept, and MB of the peak."""
    size = timm.get_pretrained_cfg(name.removeprefix(AUTHORS)).input_size[-1]
    # Not with the authors' weights: making their model, too, would leave memory to be used again.
    authors = authors if name.startswith(AUTHORS) else None
    model = make_model(name, size, "recompute" if way == "recompute_act" else "train", authors).to(device)
    model.train(way != "evaluation")
    if way == "checkpointing":
        model.set_grad_checkpointing()
    x = torch.randn(batch, 3, size, size, device=device)
    autocast = partial(torch.autocast, device, dtype=torch.bfloat16, enabled=dtype == "bfloat16")

    def step() -> None:
        with autocast(), torch.set_grad_enabled(model.training):
            out = model(x).sum()
        if model.training:
            out.backward()

    peak = measure_peak(step, device)
    with autocast(), torch.set_grad_enabled(model.training):
        return sum(find_saved(model, x).values()) / 2**20, peak / 2**20


def measure_peak(step: Callable[[], None], device: str) -> int:
    """Bytes of a step's peak over what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from what is resident
    before = read_status("VmRSS")
    step()
    return read_status("VmHWM") - before


def read_status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[*VARIANTS, "deit_small_patch16_224"])
    parser.add_argument("--authors", type=Path, help="cmt.py of a clone of the authors' code, for their models")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="bfloat16 is by autocast")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()

    keys = [(name, way) for name in args.models for way in (WAYS if name in VARIANTS else WAYS[:2])]
    figures = {}
    for name, way in tqdm(keys, unit="model"):
        arguments = name, way, args.authors, args.batch_size, args.dtype, args.device
        if args.device == "cuda":  # which says what it holds, whatever ran before
            figures[name, way] = measure(*arguments)
        else:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
                figures[name, way] = fresh.submit(measure, *arguments).result()

    print(f"\nMB kept / MB at the peak, batch {args.batch_size}, {args.dtype}, {describe(args.device)}\n")
    print(f"| model | {' | '.join(WAYS)} |\n|---|{'---|' * len(WAYS)}")
    for name in args.models:
        cells = ["{:.0f} / {:.0f}".format(*figures[name, way]) if (name, way) in figures else "-" for way in WAYS]
        print(f"| {name} | {' | '.join(cells)} |")
    if args.json:
        rows = [
            dict(model=name, way=way, kept_mb=round(kept, 1), peak_mb=round(peak, 1))
            for (name, way), (kept, peak) in figures.items()
        ]
        result = dict(vars(args), machine=describe(args.device), torch=torch.__version__, rows=rows)
        args.json.write_text(json.dumps(result, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
