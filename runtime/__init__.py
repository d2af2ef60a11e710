"""The runtime half of the package: runs a bundle's graphs with numpy and one inference library.

It never imports PyTorch.
"""
