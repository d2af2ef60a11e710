"""TensorRT: engines, built on the device that runs them and kept in the bundle."""
