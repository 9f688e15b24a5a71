"""Hooks for PyInstaller, which finds this folder by the entry point group ``pyinstaller40``."""

__all__ = ["get_hook_dirs"]


def get_hook_dirs() -> list[str]:
    """The folder that PyInstaller takes our hooks from."""
    return list(__path__)
