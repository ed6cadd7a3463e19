"""Codes: what may be asked for, how codes pack, and the arithmetic of scales and rotations."""
