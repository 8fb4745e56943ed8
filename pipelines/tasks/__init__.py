"""What an output means: decode, summary, names. One task a file."""

from collections.abc import Mapping
from typing import Any

from medmamba.errors import ConfigError
from pipelines.tasks.change import BinaryChange, Change, SemanticChange
from pipelines.tasks.regions import Regions
from pipelines.tasks.segmentation import Segmentation

Task = Segmentation | Change
TASKS: dict[str, type[Task]] = {
    "segmentation": Segmentation,
    "regions": Regions,
    "binary_change": BinaryChange,
    "semantic_change": SemanticChange,
}


def task_class(settings: Mapping[str, Any]) -> type[Task]:
    """The kind of task that a bundle's entry names. Raises ConfigError for an unknown one."""
    name = settings.get("name")
    if name not in TASKS:
        raise ConfigError(f"task {name!r} unknown; known: {', '.join(TASKS)}")
    return TASKS[name]


def build_task(settings: Mapping[str, Any]) -> Task:
    """The task of a bundle from its entry {"name", ...settings}."""
    return task_class(settings).from_settings(settings)


def segmentation_task(settings: Mapping[str, Any]) -> Segmentation:
    """The task of a bundle that labels volumes. Raises ConfigError for any other."""
    task = build_task(settings)
    if not isinstance(task, Segmentation):
        raise ConfigError(f"task {settings['name']!r} labels no volumes; a bundle of segmentation or regions does")
    return task


def change_of(task: Task) -> Change:
    """The task as one of two dates. Raises ConfigError for any other."""
    if isinstance(task, Segmentation):
        raise ConfigError("this bundle labels volumes; a pair of scenes wants a bundle of a change task")
    return task
