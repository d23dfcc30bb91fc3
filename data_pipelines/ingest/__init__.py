"""Ingest: from raw sources, wherever they lie, to a source directory, on Apache Beam."""
