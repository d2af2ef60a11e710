"""`python -m var_deploy`: the command line, for where the script's folder is not on the PATH."""

from __future__ import annotations

from var_deploy.cli import main

if __name__ == "__main__":
    main(prog_name="var-deploy")
