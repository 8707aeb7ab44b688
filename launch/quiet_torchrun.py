"""Run torchrun without its traceback, because the ranks have already reported why they ended.

Takes the arguments of torchrun. If torchrun itself fails (a port in use, missing nodes), the error is one line.
"""

from __future__ import annotations

import sys

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import parse_args, run

from retemper.engine.system import end_with_parent


def main() -> int:
    """Return the exit status: of the rank that failed first; 128 + the number of a signal to this process or to that
    rank.
    """
    end_with_parent()
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    except (dist.DistError, RendezvousError) as error:
        message = " ".join(str(error).split())[:300]
        if "EADDRINUSE" in message:
            message += "; name another port (RDZV_ENDPOINT, or --standalone on one machine)"
        sys.stderr.write(f"error: torchrun: {message}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
