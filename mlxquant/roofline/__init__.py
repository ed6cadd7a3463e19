"""What the hardware allows, what a model asks of it, and how close a run came."""
