"""Errors that the user can fix, and how a command reports them.

A :class:`UserError` gives in one line the problem (the file or key, the value) and the remedy. Commands print that
line without a traceback and exit with status 1; everything else is a bug in this project and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

EXTRA_OF = {
    **dict.fromkeys(("pyarrow", "openpyxl", "pypdf", "cryptography", "lxml"), "formats"),
    **{"jinja2": "chat", "rensa": "dedup", "tiktoken": "tiktoken", "fastokens": "fast", "torchao": "fp8"},
    **{"ftfy": "clean", "py3langid": "clean", "s3fs": "cloud", "gcsfs": "cloud", "aiohttp": "cloud"},
    **{"flash_attn": "gpu", "triton": "gpu", "matplotlib": "benchmarks", "psutil": "benchmarks"},
    **{"datasets": "hub", "datatrove": "datatrove"},
    **{"wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio", "swanlab": "swanlab", "comet_ml": "comet"},
    **{"lm_eval": "eval", "accelerate": "eval", "prometheus_client": "prometheus", "bitsandbytes": "qlora"},
}
"""Modules of optional packages, and the extra of setup.py that installs each."""
_ROOT = Path(__file__).resolve().parents[1]
_MOST_PROBLEMS = 20
"""Maximum number of problems shown for one error. More have one cause, such as a file of another program."""


ERROR_FILE_VARIABLE = "RETEMPER_ERROR_FILE"
"""Environment variable with a file for the error of a process whose parent reports it."""


class UserError(ValueError):
    """Wrong configuration, data or files: one line that names the file or key, the value and the remedy.

    Args:
        problems: usually one. Several independent ones, such as all of a configuration, are printed on a line each.
    """

    printed_elsewhere = False
    """True if another rank with the same error prints it."""

    def __init__(self, *problems: object) -> None:
        super().__init__(*problems)
        self.problems = tuple(map(str, problems))

    def __str__(self) -> str:
        return " | ".join(self.problems)


def install_command(module: str) -> str:
    """Return the command that installs the package of a module: as an extra of this package if it is optional.

    In a clone that is not installed, the command names the clone.
    """
    what = "retemper" if _is_installed() else str(_ROOT)
    extra = EXTRA_OF.get(module.partition(".")[0])
    return f"pip install '{what}[{extra}]'" if extra else shlex.join(["pip", "install", what])


def command_name(name: str, script: str) -> str:
    """Return how to start a command: as ``retemper NAME`` if the package is installed, else by its file."""
    return f"retemper {name}" if _is_installed() else shlex.join(["python", str(_ROOT / script)])


def _is_installed() -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("retemper")
    except PackageNotFoundError:
        return False
    return True


def report_user_error(error: UserError) -> None:
    """Print ``error`` on stderr, one line for each problem, naming the rank if there are several."""
    several = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    rank = f"[rank {os.environ['RANK']}] " if several else ""
    more = len(error.problems) - _MOST_PROBLEMS
    lines = [*error.problems[:_MOST_PROBLEMS], *([f"and {more} more problems"] if more > 0 else [])]
    # A path may contain bytes that are not text.
    messages = [" ".join(line.split()).encode("utf-8", "backslashreplace").decode() for line in lines]
    if (path := os.environ.get(ERROR_FILE_VARIABLE)) is not None:
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            file.write(" | ".join(messages))
        return
    if not error.printed_elsewhere:
        # In one write, because ranks share the stream, and lines of others must not come between a line and its end.
        with contextlib.suppress(OSError):  # the reader has gone
            sys.stderr.write("".join(f"{rank}error: {message}\n" for message in messages))
            sys.stderr.flush()
    if not error.printed_elsewhere or os.environ.get("LOCAL_RANK", "0") == "0":
        write_torchrun_error(" | ".join(messages))


def write_torchrun_error(message: str) -> None:
    """Leave ``message`` for torchrun's report, which would otherwise have none. The first one counts.

    The format is that of ``torch.distributed.elastic.multiprocessing.errors.ErrorHandler``.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    more = {"py_callstack": message, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError), open(path, "x", encoding="utf-8") as file:
        json.dump({"message": {"message": message, "extraInfo": more}}, file)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's ``main``, turning a :class:`UserError` into one line and exit status 1.

    A scheduler's SIGTERM ends the command as Ctrl-C does, so that it cleans up.
    """
    try:
        with _interrupted_by_sigterm():
            status = main()
            _flush()
    except UserError as error:
        report_user_error(error)
        status = 1
    except BrokenPipeError:
        # The reader of our output has gone (head, less): this is not an error, and no message can be printed.
        _discard_output()
        status = 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except SystemExit as ended:  # such as after --help
        status = _status_at_the_end(ended)
    except Exception as error:
        if message := _of_the_system(error):
            report_user_error(UserError(message))
            _discard_output()
            sys.exit(1)
        write_torchrun_error(" ".join(f"{type(error).__name__}: {error}".split())[:1000])
        raise
    sys.exit(status or 0)


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _flush() -> None:
    """Flush standard output while a failure can still be reported."""
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()


def _discard_output() -> None:
    """Redirect standard output to nothing, so that the interpreter's flush at its end discards unwritable output."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _status_at_the_end(ended: SystemExit) -> int:
    try:
        _flush()
    except BrokenPipeError:
        _discard_output()
        return 141
    except OSError as error:
        report_user_error(UserError(_incomplete(error)))
        _discard_output()
        return 1
    if isinstance(ended.code, str):
        print(ended.code, file=sys.stderr)
        return 1
    return ended.code or 0


def _of_the_system(error: BaseException) -> str | None:
    """Return the line of an error of the system and not of this program.

    These are too many open files, a full disk or output, and a missing or broken library.
    """
    if too_many := _too_many_files(error):
        return too_many
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] != "retemper":
        return f"{error}; install it: {install_command(error.name or '')}"
    if not isinstance(error, OSError):
        return None
    try:
        _flush()
    except OSError as failed:
        return _incomplete(failed)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = error.filename or "standard output, or a file that was being written,"
        return f"{what} cannot be written: {error.strerror}; free some space"
    return None


def _incomplete(error: OSError) -> str:
    return f"standard output cannot be written: {error.strerror or error}; what was printed is incomplete"


def _too_many_files(error: BaseException | None) -> str | None:
    """Return the line of an error caused by the limit of open files, however libraries have wrapped it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            break
        if "Too many open files" in str(error):
            break
        error = error.__cause__ or error.__context__
    else:
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f"too many open files: this process may open {limit:,}; raise the limit, for example with ulimit -n 4096"
