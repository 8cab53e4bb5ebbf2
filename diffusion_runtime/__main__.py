"""``python -m diffusion_runtime`` is the command ``diffusion-runtime``."""

from __future__ import annotations

import sys

from diffusion_runtime.cli import main

if __name__ == "__main__":
    sys.exit(main())
