"""The code that an MLflow model runs ("model from code"): nothing but a call, so that no function is pickled."""

from pipelines.tracking import declare_model

declare_model()
