"""Decoding: the cache, the fused step, and the loop that runs them."""
