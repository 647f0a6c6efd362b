"""Scores of predictions: pure functions of text, which also take another system's outputs."""
