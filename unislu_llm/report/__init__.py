"""The report of a comparison: one page with plots, tables and examples."""
