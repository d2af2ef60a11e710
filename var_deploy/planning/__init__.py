"""What a model needs on a device: weights and operations, memory, devices, and the plan of it."""
