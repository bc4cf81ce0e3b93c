"""What is measured: one module a benchmark, run by `shoal bench NAME`."""
