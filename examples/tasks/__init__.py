"""The registry of example tasks, in the order in which tables list them."""

from examples.tasks import cron, emails, headlines, home, languages, numerals, reviews
from examples.tasks.task import Row, Split, Task

__all__ = ["TASKS", "Row", "Split", "Task"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        cron.TASK,
        home.TASK,
        languages.TASK,
        headlines.TASK,
        reviews.TASK,
        emails.TASK,
        numerals.FRENCH,
        numerals.SPANISH,
    )
}
