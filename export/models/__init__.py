"""PyTorch modules of the models: the reference for the written graphs."""
