"""What you need to write a stage of your own: the contract, parameters from text, code by reference, the cache key."""
