"""One case at a time on a GPU: a lock of the operating system, and under Prefect the concurrency limit `gpu`."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIMIT = "gpu"
LEASE_SECONDS = 60  # a holder that was killed blocks the limit this long


@contextmanager
def gpu_lock(device: str) -> Iterator[None]:
    """Holds a GPU of this machine against other processes and threads; the kernel frees it when the holder dies.

    Does nothing for the CPU.
    """
    if device.startswith("cpu"):
        yield
        return
    path = Path(tempfile.gettempdir()) / f"medmamba-{device.replace(':', '-')}.lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def gpu_slot(device: str) -> Iterator[None]:
    """Inside a flow: the limit `gpu` of the Prefect server, where one is shared, then the lock of this machine.

    The embedded server serves one process alone and forgets its leases with it, so a killed batch would leave the limit
    taken for ever: there the machine's lock does the work.
    """
    from prefect.concurrency.sync import concurrency
    from prefect.settings import get_current_settings

    if device.startswith("cpu") or get_current_settings().api.url is None:
        with gpu_lock(device):
            yield
        return

    with concurrency(LIMIT, occupy=1, strict=True, lease_duration=LEASE_SECONDS), gpu_lock(device):
        yield


def create_limit() -> None:
    """Makes the limit `gpu` (one at a time) on the Prefect server; one that is there stays as it is."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(LIMIT)
        except ObjectNotFound:
            try:
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=1))
            except ObjectAlreadyExists:
                return
