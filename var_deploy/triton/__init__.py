"""A model repository that NVIDIA Triton serves.

    config      config.pbtxt: what Triton is told of the model, and what the model reads from it
    repository  writes the folders
    model       what Triton's Python backend runs: requests in, images of a `Pipeline` out

`model` is imported in the server alone, which brings the module that it talks through.
"""
