"""What runs: linear layers that mlx-lm does not have, correct on any back end."""
