"""Train a quantised model's scales, and if asked its codes, on the original's predictions."""
