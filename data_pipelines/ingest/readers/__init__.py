"""Readers of raw sources: one short file each, and a line in `registry.READERS`."""
