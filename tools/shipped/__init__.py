"""Files that exporters copy into artifacts, to run beside them without JAX."""
