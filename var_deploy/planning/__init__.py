"""Predicts what a model needs on a device: weights, operations, memory and least time."""
