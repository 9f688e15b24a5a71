"""A program that imports timm gets this package with it: it imports nothing of ours, so PyInstaller cannot see that."""

from PyInstaller.utils.hooks import collect_dynamic_libs

hiddenimports = ["timm_cmt"]
# timm imports torchvision. PyInstaller misses its extensions, which torchvision has renamed (in 0.29 or before).
binaries = collect_dynamic_libs("torchvision", search_patterns=["*.so", "*.pyd"])
