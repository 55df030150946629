"""The GPU kernels: which variant serves which op, their launch from PyTorch, and their build ahead of time."""
