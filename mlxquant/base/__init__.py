"""What everything stands on: errors, files, and the BLAS that must load before MLX."""
