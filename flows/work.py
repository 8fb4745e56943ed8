"""The due cases of a batch in chunks, and what came of them; the same with and without Prefect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from flows.gpu import gpu_lock
from pipelines.cases.archive import Item
from pipelines.report import Report
from pipelines.serving.process import Workplace, process_case

MANY, CHUNK = 1000, 50


@dataclass(kw_only=True)
class Work:
    """`items` are due; `reports` grows by case id as they end; `tell(report)` hears of each."""

    place: Workplace
    items: Sequence[Item]
    tell: Callable[[Report], None] = lambda _: None
    reports: dict[str, Report] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._by_id = {item.case.id: item for item in self.items}

    def chunks(self) -> list[list[str]]:
        """Case ids, one a chunk, or 50 when there are more than a thousand."""
        size = CHUNK if len(self.items) > MANY else 1
        ids = list(self._by_id)
        return [ids[at : at + size] for at in range(0, len(ids), size)]

    def run(self, ids: Sequence[str], *, last: bool, slot: Callable[[str], AbstractContextManager[None]]) -> None:
        """Runs the cases of a chunk that have not ended yet, each holding `slot(device)`.

        Unless `last`, an error that may pass is raised after the others are done; running the chunk again mends it.
        """
        trouble: OSError | None = None
        for case in ids:
            if case in self.reports:
                continue
            try:
                with slot(str(self.place.predictor.device)):
                    report = process_case(self.place, self._by_id[case], last=last)
            except OSError as error:
                trouble = trouble or error
                continue
            self.reports[case] = report
            self.tell(report)
        if trouble is not None:
            raise trouble


def run_in_order(work: Work, workers: int) -> None:
    """Without Prefect: one chunk after another."""
    for chunk in work.chunks():
        work.run(chunk, last=True, slot=gpu_lock)
