"""Build-machine half."""
