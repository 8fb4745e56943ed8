"""When, what next, what on failure. The only room that imports prefect and dask; the command line lives here."""
