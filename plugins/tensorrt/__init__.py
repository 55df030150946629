"""The ops as plugins of TensorRT: in Python, and in C++, which is no part of this package."""
