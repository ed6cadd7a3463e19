"""``python -m mlxquant``."""

from mlxquant.cli import main

main()
