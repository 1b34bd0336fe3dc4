"""What do I need to write a stage of my own? The contract, parameters from text, code by reference, the cache key."""
