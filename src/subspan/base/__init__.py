"""What every room stands on: files and what they may hold, tables in them, optional dependencies."""
