"""The answer: systems beside each other, as data, words, tables and a page."""
