"""What timm's train.py lacks to run in many processes on the CPU, for its ``--device-modules cpu_device``.

* It gives DistributedDataParallel the CPU as one of its ``device_ids``, which torch refuses.
* torch's SyncBatchNorm refuses the CPU. The one here has the same statistics, over the images of all processes.
"""

import torch
from torch import Tensor
from torch.distributed import get_world_size
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

_init = DistributedDataParallel.__init__


def _init_without_devices(self, module, device_ids=None, **options) -> None:
    _init(self, module, **options)


class SyncBatchNorm(torch.nn.BatchNorm2d):
    def __init__(self, num_features, eps, momentum, affine, track_running_stats, process_group):
        super().__init__(num_features, eps, momentum, affine, track_running_stats)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        count = x.numel() // x.shape[1] * get_world_size()
        mean = all_reduce(x.sum((0, 2, 3), keepdim=True)) / count
        var = all_reduce((x - mean).square().sum((0, 2, 3), keepdim=True)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten() * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = (var + self.eps).rsqrt() * self.weight[:, None, None]
        return (x - mean) * scale + self.bias[:, None, None]


DistributedDataParallel.__init__ = _init_without_devices
torch.nn.SyncBatchNorm = SyncBatchNorm
