"""Results against a reference."""
