"""Text from a loaded model, and how fast it came beside what the machine can read."""
