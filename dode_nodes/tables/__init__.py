"""Rows and tables: what a fit has found, as validated data, as a file, in words and in pictures."""
