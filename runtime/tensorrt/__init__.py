"""The backend for TensorRT: builds engines on the device, stores them in the bundle, runs them."""
