"""``python -m timm_cmt`` is ``timm-cmt``."""

import sys

from .cli import main

sys.exit(main())
