"""Benchmarks: one module each, found by ``registry``; ``result`` holds what they share."""
