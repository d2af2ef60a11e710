"""`python -m var_deploy.device_check`: what only a machine with a GPU can show."""
