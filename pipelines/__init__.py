"""One run from case to result. The only room that imports mlflow, monai and pydantic."""
