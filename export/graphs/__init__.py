"""Writes the ONNX graphs of a bundle operator by operator, from the sizes of the model.

The graphs are not traced from PyTorch modules: no weights are needed, a d16 takes a second, the
bytes are the same every time, every operator is one that TensorRT 10.3 takes, and the values carry
the parameters' names. It also makes `verify` meaningful: it compares two implementations, not an
implementation with its own trace.
"""
