"""The graphs of a bundle, written operator by operator.

They are built straight from the sizes of the model rather than traced from its PyTorch modules:
no weights are needed, a d16 takes a second, the bytes are the same every time, every operator is
one that TensorRT 10.3 takes, and the values carry the parameters' names. It also makes `verify`
worth running: it compares two implementations, not one with its own trace.
"""
