"""A file for each group of metrics."""
