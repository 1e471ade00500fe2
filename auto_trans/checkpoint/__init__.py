"""Bytes at rest: checkpoint files are found, read, written and published here."""
