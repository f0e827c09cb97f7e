"""Measures the ops against their peers: `python -m benchmarks --help`."""
