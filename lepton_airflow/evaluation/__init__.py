"""Is a model good, and has the world moved?"""
