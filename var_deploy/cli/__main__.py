"""`python -m var_deploy.cli`, which is the same program as `python -m var_deploy`."""

from __future__ import annotations

from var_deploy.__main__ import main

if __name__ == "__main__":
    main()
