"""Single ops: the cases, and who runs them."""
