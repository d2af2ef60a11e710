"""Writes and runs a model repository for NVIDIA Triton.

    config      config.pbtxt: the model's settings, for Triton and for `model`
    repository  writes the repository's folders
    model       the model for Triton's Python backend: requests → images of a `Pipeline`

`model` is imported only in the server, which provides the module triton_python_backend_utils.
"""
