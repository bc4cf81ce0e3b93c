"""Which ranks exist, where, and whether they live."""
