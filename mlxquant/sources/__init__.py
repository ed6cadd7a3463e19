"""Where models come from: names, recipes, checkpoints and GGUF files."""
