"""Brings this package into programs that import timm. They never name it, so PyInstaller cannot see it by itself."""

from PyInstaller.utils.hooks import collect_dynamic_libs  # type: ignore[import-untyped]

hiddenimports = ["timm_cmt"]
# timm imports torchvision. PyInstaller misses its extensions, which torchvision has renamed (in 0.29 or before).
binaries = collect_dynamic_libs("torchvision", search_patterns=["*.so", "*.pyd"])
