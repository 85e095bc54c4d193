"""What every room stands on: the doors of arrays and estimators, files and tables in them, optional dependencies."""
