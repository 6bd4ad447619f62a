"""Configs, what is refused, and the command line; no torch."""
