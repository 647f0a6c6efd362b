"""Comparison of runs; reads predictions, never models."""
