"""GPU kernels, one a file: equation, reference in ``mx`` operations, body, launcher.

None is built at import.
"""
