"""Tests of what several processes do together, in children that can neither hang nor end the process of the tests."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


def in_processes(function: Callable[[int], object], count: int = 1, seconds: float = 200.0) -> None:
    """Call `function(rank)` in `count` processes that are one gloo group; fail with what the first to fail said.

    They are forked, since a new one takes seconds to import torch, and end without taking the group down: gloo's
    threads may wait for the interpreter while the interpreter waits for them, which would hold the tests for ever.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs processes that are forked")
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder, f"report-{rank}") for rank in range(count)]

        def child(rank: int) -> None:
            report = reports[rank].open("w")
            faulthandler.register(signal.SIGUSR1, file=report)
            status = 1
            try:
                torch.distributed.init_process_group(
                    "gloo", store=torch.distributed.FileStore(f"{folder}/store", count), rank=rank, world_size=count
                )
                function(rank)
                status = 0
            except BaseException:
                traceback.print_exc(file=report)
            report.flush()
            os._exit(status)

        children = [multiprocessing.get_context("fork").Process(target=child, args=(rank,)) for rank in range(count)]
        for each in children:
            each.start()
        try:
            for each in children:
                each.join(seconds)
            late = [each for each in children if each.is_alive()]
            for each in late:  # Where it stands is written into its report.
                os.kill(each.pid, signal.SIGUSR1)
                each.join(1)
            for each, report in zip(children, reports, strict=True):
                assert each.exitcode == 0, report.read_text() or f"ended with {each.exitcode}"
                assert each not in late, report.read_text()
        finally:
            for each in children:
                each.kill()
                each.join()
