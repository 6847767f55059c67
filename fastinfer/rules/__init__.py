"""Rules: what a module must have to be replaced, and what replaces it."""
