"""What `/metrics` shows of uploads and jobs, read from disk at each scrape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.jobs.job import Job, JobState
from store.upload import Upload


class WorkCollector(Collector):
    """Open uploads, and jobs by state.

    Args:
        uploads: all open ones.
        jobs: all that are remembered.
    """

    def __init__(self, uploads: Callable[[], Sequence[Upload]], jobs: Callable[[], Sequence[Job]]) -> None:
        self._uploads = uploads
        self._jobs = jobs

    def collect(self) -> Iterator[Metric]:
        uploads = self._uploads()
        declared, received = (sum(getattr(one, field) for one in uploads) for field in ("bytes", "offset"))
        for name, what, value in (
            ("switchyard_uploads_open", "Resumable uploads that are begun or wait to be used.", len(uploads)),
            ("switchyard_uploads_declared_bytes", "What open uploads will take on disk.", declared),
            ("switchyard_uploads_received_bytes", "What of them is there.", received),
        ):
            yield GaugeMetricFamily(name, what, value=value)
        jobs = GaugeMetricFamily("switchyard_jobs", "Jobs by state; ended ones for as long as they are remembered.",
                                 labels=["state"])  # fmt: skip
        found = Counter(job.state for job in self._jobs())
        for state in JobState:
            jobs.add_metric([state.value], found[state])
        yield jobs

    def describe(self) -> Iterator[Metric]:
        return iter(())
