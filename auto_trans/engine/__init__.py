"""Moves bytes as a plan says."""
