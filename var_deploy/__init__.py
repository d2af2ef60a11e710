"""var-deploy."""
