"""The commands of `python -m bench`, a file a family; their options come from settings."""
