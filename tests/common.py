"""What several tests need: the models, the authors' layout with deterministic weights, images.

The tables of models follow from those in timm_cmt/cmt.py, so that a new variant has its numbers there alone.
"""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_cmt.cmt import VARIANTS, default_cfgs

PARITY = Path(__file__).parent / "parity"
MODELS = list(VARIANTS)
SIZES = {name: default_cfgs[name].default.input_size[-1] for name in MODELS}
SMALL = dict(img_size=64, num_classes=10, depths=(1, 1, 2, 1))  # arguments of a model that is quick to run
RELEASE_FILES = {  # of the variants that the authors have released weights of
    name: url.rpartition("/")[2] for name in MODELS if (url := default_cfgs[name].default.url)
}
WITH_WEIGHTS = list(RELEASE_FILES)
RESIZES = {"Less", "Resize"}  # operators of ONNX graphs in which a position bias is resized, and of no others


def _values(key: str, shape: list[int], seed: int) -> np.ndarray:
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "little"))
    last = key.rpartition(".")[2]
    if last == "num_batches_tracked":
        return np.array(1000)
    if last == "running_var":
        return 0.5 + rng.random(shape)
    if last == "running_mean":
        return 0.1 * rng.standard_normal(shape)
    if key.startswith("relative_pos"):
        return rng.standard_normal(shape)
    if last == "bias":
        return 0.1 * rng.standard_normal(shape)
    if len(shape) == 1:
        return 1 + 0.1 * rng.standard_normal(shape)
    return rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))


@functools.cache
def _authors_weights(variant: str, seed: int) -> dict[str, torch.Tensor]:
    layout = json.loads((PARITY / f"layout_{variant}.json").read_text())
    return {
        key: torch.from_numpy(np.asarray(_values(key, shape, seed))).to(getattr(torch, dtype.removeprefix("torch.")))
        for key, shape, dtype in layout
    }


def authors_weights(variant: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict in the authors' layout, made as parity/README.md says (seed 0 gives the expected outputs there)."""
    return {key: value.clone() for key, value in _authors_weights(variant, seed).items()}


def parity_input(size: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(7).standard_normal((2, 3, size, size)).astype(np.float32))


def images(batch: int = 4, channels: int = 3, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


class _Storages(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            self.made[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return out


def count_kept(model: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes that are there after a forward pass in training: autograd's, and what a checkpoint keeps by itself."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    with _Storages() as storages:
        out = model.train()(x)  # noqa: F841 (the graph is there as long as this)
        return sum(n for at, (storage, n) in storages.made.items() if at not in own and not storage.expired())


def need(package: str, pip: str = ""):
    """A package that is not always installed; a test that needs it is skipped, and says so."""
    return pytest.importorskip(package, reason=f"NOT TESTED: {package}; pip install {pip or package}")
