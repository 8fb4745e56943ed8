"""What an output means: decode, summary, names. One task a file."""

from collections.abc import Mapping
from typing import Any

from medmamba.errors import ConfigError
from pipelines.tasks.segmentation import Segmentation

TASKS = {"segmentation": Segmentation}


def build_task(settings: Mapping[str, Any]) -> Segmentation:
    """The task of a bundle from its entry {"name", ...settings}."""
    name = settings.get("name")
    if name not in TASKS:
        raise ConfigError(f"task {name!r} unknown; known: {', '.join(TASKS)}")
    return TASKS[name].from_settings(settings)
