"""Checkpoint 2.0 of MindFormers on disk: find and read it, and write it."""
