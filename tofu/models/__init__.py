"""Families and architectures, and models loaded, run and saved."""
