"""The machinery of a run: its description, the loop, metrics, and the report at the end."""
