"""Entry point of `python -m var_deploy.device_check`."""

from __future__ import annotations

import sys

from var_deploy.device_check.command import main

if __name__ == "__main__":
    sys.exit(main())
