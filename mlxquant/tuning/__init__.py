"""Train what is left free when a model's codes are fixed: scales, on the original's predictions."""
