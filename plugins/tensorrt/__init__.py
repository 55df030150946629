"""The ops as plugins of TensorRT: in Python, and in C++, which is not part of this package."""
