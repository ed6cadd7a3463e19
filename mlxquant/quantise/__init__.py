"""Quantization methods, one file each, with one signature:
(weight, statistics, spec) → codes and scales."""
