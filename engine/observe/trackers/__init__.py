"""Experiment trackers as observers of a run: a small client for each, and what they share."""
