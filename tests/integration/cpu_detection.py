"""Runs torchvision's train.py with what it lacks on the CPU: python cpu_detection.py path/to/train.py ARGUMENTS

* It has no argument for the size of images: here they are small.
* In many processes it wants CUDA: its devices, NCCL, and a GPU for each process.
"""

import functools
import runpy
import sys

import cpu_device  # noqa: F401 (lends DistributedDataParallel the CPU)
import torch
import torchvision

torchvision.models.get_model = functools.partial(torchvision.models.get_model, min_size=96, max_size=160)
torch.cuda.set_device = lambda device: None
_init, _tensor = torch.distributed.init_process_group, torch.tensor
torch.distributed.init_process_group = lambda backend, **options: _init("gloo", **options)
torch.tensor = lambda *data, device=None, **options: _tensor(
    *data, device=None if device == "cuda" else device, **options
)

del sys.argv[0]
sys.path[0] = sys.argv[0].rpartition("/")[0]  # where Python would look for what the script imports
runpy.run_path(sys.argv[0], run_name="__main__")
