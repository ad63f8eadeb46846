"""Alembic migrations, shipped with the package and run by `storage/database.py`."""
