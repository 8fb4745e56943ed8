"""Operators: pure functions of tensors, each with its slow, obvious definition beside it."""
