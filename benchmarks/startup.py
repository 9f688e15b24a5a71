"""What timm-cmt adds to `import torch` and `import timm`, and how long its models take to make.

"Without" is with torch's autoload switched off, so that the package is not looked at. Each import is in a fresh
interpreter, with and without in turn. Run: python benchmarks/startup.py [--rounds 10]
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import timm
from tqdm import tqdm

PEERS = ["deit_small_patch16_224", "swin_small_patch4_window7_224", "twins_svt_base", "vit_base_patch16_224"]


def import_seconds(module: str, autoload: str) -> float:
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload},
        check=True,
    )
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()

    print("| | without, s | with, s | difference, ms |\n|---|---|---|---|")
    for module in ("torch", "timm"):
        pairs = []
        for round_ in tqdm(range(args.rounds + 1), desc=f"import {module}", leave=False):
            order = "01" if round_ % 2 else "10"
            taken = {autoload: import_seconds(module, autoload) for autoload in order}
            pairs.append((taken["0"], taken["1"]))
        without, with_ = zip(*pairs[1:])  # the first fills the disk's cache
        difference = statistics.median(b - a for a, b in pairs[1:])
        cells = f"{statistics.median(without):.2f} | {statistics.median(with_):.2f} | {1e3 * difference:.0f}"
        print(f"| import {module} | {cells} |")

    print("\n| model | parameters, M | create_model, s |\n|---|---|---|")
    for name in [*timm.list_models("cmt*"), *PEERS]:
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            model = timm.create_model(name)
            seconds.append(time.perf_counter() - start)
        params = sum(param.numel() for param in model.parameters())
        print(f"| {name} | {params / 1e6:.1f} | {statistics.median(seconds):.2f} |")


if __name__ == "__main__":
    main()
