"""One fault in this process, at its n-th operation of some kind on some path.

It hooks operating-system calls as Python makes them (audit events, ``io.open``, ``os.write``, ``os.fsync``,
``os.rename``) and knows nothing of the program but the names of its files; so it finds its moment in whatever thread
and function of ours the work is done. Standard library only: it is imported before anything else.
"""

import builtins
import errno
import io
import json
import os
import re
import signal
import sys
import threading
import time

WRITING = set("wax+")


def install(text, rank):
    """Arm the fault described by the JSON ``text``, unless it is for another rank."""
    spec = json.loads(text)
    if spec["rank"] not in (rank, "all"):
        return
    fault = Fault(spec, rank)
    if spec["op"] == "evaluate":
        sys.setprofile(fault.on_call)
    sys.addaudithook(fault.on_audit)
    _wrap_writes(fault)
    _wrap_renames(fault)
    if spec["action"] == "clock":
        _wrap_clock(fault)


class Fault:
    """Counts the operations that match, and acts at the n-th.

    Keys of ``spec``: rank (or "all"), op, pattern (searched for in the path), nth, action, folder (of the run), fired
    (file to which a line is added when it happens); for action "error" errno and lasting; for "clock" seconds.
    """

    def __init__(self, spec, rank):
        self.spec, self.rank = spec, rank
        self.pattern = re.compile(spec["pattern"])
        self.count, self.fired = 0, False
        self.clock_offset = 0.0
        self.lock = threading.Lock()
        self.inside = threading.local()

    def on_call(self, frame, event, argument):
        """Profile hook: the beginning of an evaluation is the call of an ``evaluate`` of the engine."""
        if event == "call" and frame.f_code.co_name == "evaluate" and "/engine/" in frame.f_code.co_filename:
            self.see("evaluate", frame.f_code.co_filename)

    def on_audit(self, event, arguments):
        """Operations that Python announces before it makes them."""
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, int):
                return
            writing = bool(WRITING & set(mode)) if mode else bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            self.see("create" if writing else "read", path)
        elif event == "os.rename":
            self.see("rename", f"{whole(arguments[0], arguments[2])} -> {whole(arguments[1], arguments[3])}")
        elif event in ("os.remove", "os.rmdir"):
            self.see("remove", whole(arguments[0], arguments[1]))
        elif event == "os.mkdir":
            self.see("mkdir", whole(arguments[0], arguments[2]))

    def see(self, op, path):
        """``op`` is about to happen to ``path``. Raises OSError where the fault is a refusing disk."""
        if getattr(self.inside, "hook", False):
            return
        self.inside.hook = True
        try:
            path = os.fsdecode(path)
            if self.matches(op, path):
                self.act(path)
            elif self.fired and self.spec.get("lasting") and op in self.refused():
                self.refuse(path)
        finally:
            self.inside.hook = False

    def matches(self, op, path):
        if self.fired or op != self.spec["op"] or not self.pattern.search(path):
            return False
        with self.lock:
            self.count += 1
            return self.count == self.spec["nth"]

    def refused(self):
        """What a disk that is full, read-only or broken refuses."""
        by_errno = {"ENOSPC": ("create", "write", "mkdir"), "EROFS": ("create", "mkdir", "rename", "remove")}
        return by_errno.get(self.spec["errno"], ("create", "write", "sync", "mkdir", "rename"))

    def act(self, path):
        self.fired, action = True, self.spec["action"]
        happened = {"rank": self.rank, "pid": os.getpid(), "path": path, "count": self.count, "action": action}
        with io.FileIO(self.spec["fired"], "a") as file:
            file.write((json.dumps(happened) + "\n").encode())
        if action == "clock":
            self.clock_offset = self.spec["seconds"]
        elif action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif action == "error":
            self.refuse(path)
        elif action in ("no reader", "full output"):
            lose_output(action)
        else:
            kill(action)

    def refuse(self, path):
        if not path.startswith(self.spec["folder"]):
            return
        code = getattr(errno, self.spec["errno"])
        raise OSError(code, os.strerror(code), path)


def lose_output(how):
    """Standard output and error become a pipe that has no reader, or a file on a full disk."""
    if how == "no reader":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open("/dev/full", os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(writing, descriptor)


def kill(target):
    """SIGKILL to this rank, to all ranks, to the launcher, or to all ranks and the launcher."""
    me, ranks = os.getpid(), []
    if target in ("kill ranks", "kill node"):
        with open(f"/proc/{os.getppid()}/task/{os.getppid()}/children", encoding="ascii") as file:
            ranks = [int(pid) for pid in file.read().split() if int(pid) != me]
    for pid in [os.getppid()] * (target in ("kill launcher", "kill node")) + ranks:
        os.kill(pid, signal.SIGKILL)
    if target != "kill launcher":
        os.kill(me, signal.SIGKILL)


def whole(path, folder_descriptor):
    """An absolute path, where ``path`` may be relative to an open folder."""
    path = os.fsdecode(path)
    if os.path.isabs(path) or folder_descriptor in (None, -1):
        return os.path.abspath(path)
    return os.path.join(os.readlink(f"/proc/self/fd/{folder_descriptor}"), path)


class TornFile:
    """A file that is being written; where the fault comes, half of what is to be written is."""

    def __init__(self, file, path, fault):
        self.__dict__.update(_file=file, _path=path, _fault=fault)

    def write(self, data):
        fault, rest = self._fault, data
        if fault.spec["op"] == "write" and not fault.fired and fault.pattern.search(self._path):
            with fault.lock:
                torn = fault.count + 1 == fault.spec["nth"]
            if torn:
                self._file.write(data[: len(data) // 2])
                self._file.flush()
                rest = data[len(data) // 2 :]
        fault.see("write", self._path)
        self._file.write(rest)  # where this process lives on
        return len(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __iter__(self):
        return iter(self._file)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *exc_info):
        return self._file.__exit__(*exc_info)


def _wrap_writes(fault):
    real_open, real_write, real_fsync = io.open, os.write, os.fsync

    def opened(file, mode="r", *arguments, **options):
        stream = real_open(file, mode, *arguments, **options)
        if isinstance(file, int) or not WRITING & set(mode):
            return stream
        path = os.path.abspath(os.fsdecode(os.fspath(file)))
        return TornFile(stream, path, fault) if path.startswith(fault.spec["folder"]) else stream

    def write(descriptor, data):
        fault.see("write", os.readlink(f"/proc/self/fd/{descriptor}"))
        return real_write(descriptor, data)

    def fsync(descriptor):
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        fault.see("sync", os.readlink(f"/proc/self/fd/{number}"))
        return real_fsync(descriptor)

    builtins.open = io.open = opened
    os.write, os.fsync = write, fsync


def _wrap_renames(fault):
    for name in ("rename", "replace"):
        real = getattr(os, name)

        def renamed(source, target, *arguments, real=real, **options):
            real(source, target, *arguments, **options)
            fault.see("renamed", f"{os.path.abspath(source)} -> {os.path.abspath(target)}")

        setattr(os, name, renamed)


def _wrap_clock(fault):
    real_time, real_time_ns = time.time, time.time_ns
    time.time = lambda: real_time() + fault.clock_offset
    time.time_ns = lambda: real_time_ns() + int(fault.clock_offset * 1e9)
