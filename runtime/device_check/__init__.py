"""`python -m var_deploy.runtime.device_check`: what only a machine with a GPU can show."""
