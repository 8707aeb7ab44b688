"""Protect a run against harmful steps, hangs, dead or inconsistent ranks, and the end of the process."""
