"""A packaged model in smaller number formats, measured beside the original."""
