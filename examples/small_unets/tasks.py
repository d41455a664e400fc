"""All tasks, by name."""

from examples.small_unets.digits import CLASS_CONDITIONAL, CROSS_ATTENTION
from examples.small_unets.photos import PHOTO_CROPS
from examples.small_unets.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (CROSS_ATTENTION, CLASS_CONDITIONAL, PHOTO_CROPS)}
