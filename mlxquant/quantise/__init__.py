"""From a model to a smaller one, block by block: calibration, methods (one file each), budgets."""
