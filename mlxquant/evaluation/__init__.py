"""How good a model is: perplexity by a stated protocol."""
