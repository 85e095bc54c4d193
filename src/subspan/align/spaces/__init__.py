"""Compare two spaces of the same things and map one onto the other."""
