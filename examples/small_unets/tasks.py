"""All tasks, by name."""

from digits import CLASS_CONDITIONAL, CROSS_ATTENTION
from photos import PHOTO_CROPS
from task import Task

TASKS: dict[str, Task] = {task.name: task for task in (CROSS_ATTENTION, CLASS_CONDITIONAL, PHOTO_CROPS)}
