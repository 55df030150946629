"""GPU kernels, one file an op; compiled just in time for PyTorch and ahead of time for everything else."""
