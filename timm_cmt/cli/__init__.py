"""What the command line runs. Nothing else in the package imports it.

`command_line` parses; each command has a module of its own, which is imported when the command runs, so that
``timm-cmt --help`` waits for neither torch nor timm.
"""

from .command_line import main

__all__ = ["main"]
