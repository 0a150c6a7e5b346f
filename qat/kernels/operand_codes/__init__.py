"""Codes as products take them: scaled, row-major along what is summed."""
