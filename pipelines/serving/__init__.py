"""One case from files to products, whatever happens to the others."""
