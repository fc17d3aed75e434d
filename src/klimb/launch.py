"""`--nproc N`: the same command in N processes of this machine, by torch's own launcher.

Who is killed takes the others along; all of them start again and go on from the newest checkpoint. A mistake of the user's is
said once, and ends all.
"""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Sequence

RESTARTS = 3
"""how often a run whose processes die is taken up again"""


def launch(nproc: int, arguments: Sequence[str]) -> int:
    """Run `klimb ARGUMENTS` in `nproc` processes; the exit status of them all.

    Args:
        nproc: how many.
        arguments: what stands behind `klimb`, without --nproc.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    # else processes that start again find the addresses of the dead in the launcher's store (torch 2.13), and wait for them
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the name of a machine need not lead to it
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=RESTARTS,
        monitor_interval=0.2,
        signals_to_handle="SIGTERM,SIGHUP,SIGQUIT",
    )
    # Ctrl-C goes to the first rank, which ends its step; the others inherit that they do not hear it
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return max(elastic_launch(config, work)(list(arguments)).values())
    except SignalException as ended:
        return 130 if ended.sigval == signal.SIGTERM else 128 + ended.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(
            f"klimb: process {rank} of {nproc} died {RESTARTS + 1} times, at last with exit status {failure.exitcode}; "
            "what it had written is whole, and --resume goes on from there",
            file=sys.stderr,
        )
        return 1
    finally:
        signal.signal(signal.SIGINT, before)


def work(arguments: Sequence[str]) -> int:
    """One of the processes."""
    from klimb.cli import main  # it is what was asked for: the same command

    try:
        main(arguments)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    else:
        status = 0
    if status == 1:  # another process is gone: the launcher starts all again
        sys.exit(1)
    if status == 130:  # no run to wait for
        os.kill(os.getppid(), signal.SIGTERM)
    return status


def taken_up_again() -> bool:
    """Whether the launcher has started this process again, after one of them died."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
