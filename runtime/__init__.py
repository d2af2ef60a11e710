"""The edge half: drives a bundle's graphs with numpy and one engine library, never with PyTorch."""
