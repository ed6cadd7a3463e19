"""Measurements for people: quality, speed, and plans for a machine."""
