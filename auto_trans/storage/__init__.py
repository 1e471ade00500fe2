"""Bytes at rest: the only room that touches files."""
