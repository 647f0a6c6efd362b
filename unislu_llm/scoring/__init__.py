"""Scores of predictions as pure functions of text: words, entities, labels, SLUE score, intervals."""
