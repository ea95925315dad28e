"""Reports of a run: metrics, pictures, tables and speed."""
