"""A model as files."""
