"""How good a model is: perplexity, divergence from a reference, error by layer, methods compared."""
