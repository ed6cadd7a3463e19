"""A model folder as a network in memory, loaded, described, or split over machines."""
