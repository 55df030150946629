"""Benchmarks of the native ops against their peers."""
