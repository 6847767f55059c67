"""Decoding: the cache, the step of one token, and the loop around it."""
