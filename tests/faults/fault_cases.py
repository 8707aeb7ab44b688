"""The cases as data: every one is drawn from (seed, kind, number) alone, and bears the name ``kind.number``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from fault_damage import FILES, FORMS, STRAYS

SHORT_TIMEOUT = ("--parallel.timeout_seconds", "6")
"""For cases that wait for it."""
_TEMPORARY = r"/\.step-\d+\.[0-9a-f]{32}\.tmp"
_SHARD = _TEMPORARY + r"/rank-\d{5}\.safetensors$"
POINTS: dict[str, tuple[str, str, str | int]] = {
    "shard made": ("create", _SHARD, ""),
    "shard half-written": ("write", _SHARD, ""),
    "shard flushed": ("sync", _SHARD, ""),
    "table half-written": ("write", _TEMPORARY + r"/tensors\.json", 0),
    "hf files written": ("create", _TEMPORARY + "/hf/", 0),
    "hf files flushed": ("sync", _TEMPORARY + "/hf", 0),
    "manifest made": ("create", _TEMPORARY + r"/manifest\.json", 0),
    "manifest half-written": ("write", _TEMPORARY + r"/manifest\.json", 0),
    "manifest flushed": ("sync", _TEMPORARY + r"/manifest\.json", 0),
    "before rename": ("rename", _TEMPORARY + r" -> .*/step-\d+$", 0),
    "after rename": ("renamed", _TEMPORARY + r" -> .*/step-\d+$", 0),
    "parent flushed": ("sync", r"/checkpoints$", 0),
    "before removal": ("rename", r"/step-\d+ -> .*" + _TEMPORARY, 0),
    "removal begun": ("renamed", r"/step-\d+ -> .*" + _TEMPORARY, 0),
    "half removed": ("remove", _TEMPORARY + "/", 0),
    "folder removed": ("remove", _TEMPORARY + "$", 0),
    "evaluation": ("evaluate", "", ""),
    "checkpoint read": ("read", r"/step-\d+/rank-\d{5}\.safetensors$", ""),
    "before the lock": ("create", r"/\.lock$", 0),
    "config.yaml half-written": ("write", r"/config\.yaml$", 0),
    "curve half-written": ("write", r"/metrics\.tmp$", 0),
    "before curve replaced": ("rename", r"/metrics\.tmp -> ", 0),
    "record half-written": ("write", r"/metrics\.jsonl$", 0),
}
"""Moments: (operation, pattern of the path, rank that comes there; empty: any). See hooks/fault_hook.py."""

KILLS = ("kill", "kill ranks", "kill launcher", "kill node")


@dataclass(frozen=True)
class Case:
    """One fault.

    ``rest``: done to the run folder before a launch, ``{"do": key of DAMAGES, ...}``. ``fault``: done while it runs,
    ``{"by": "signal" | "hook" | "disk" | "read_only", ...}``; its ``then`` says how the launch ends: ``wait`` for it,
    kill the node some ``seconds`` or ``steps`` after.
    """

    name: str
    kind: str
    rest: dict[str, Any] | None = None
    fault: dict[str, Any] | None = None
    refused: bool = False
    """Whether the launch after it must be refused, and the folder stay as it is."""
    options: tuple[str, ...] = ()
    """Of the command, in all launches of its lineage."""
    note: str = ""
    """The fault in words."""


def _moment(random: Random) -> dict[str, Any]:
    """Some steps after the launch's first, and a part of one."""
    return {"steps": random.randint(1, 9), "delay": round(random.random() * 0.25, 3)}


def _then(random: Random) -> dict[str, Any]:
    """What the launcher and the other ranks do is their matter in a third of the cases; in the rest the node dies."""
    return {"wait": True} if random.random() < 1 / 3 else {"seconds": round(random.random(), 2)}


def _signal(target: str, at: dict[str, Any], then: dict[str, Any], number: str = "KILL", **more: Any) -> dict[str, Any]:
    return {"by": "signal", "signal": number, "target": target, "at": at, "then": then, **more}


def _hook(point: str, nth: int, random: Random, action: str, then: dict[str, Any], **more: Any) -> dict[str, Any]:
    op, pattern, rank = POINTS[point]
    chosen = random.randint(0, 1) if rank == "" else rank
    spec = {"rank": chosen, "op": op, "pattern": pattern, "nth": nth, "action": action}
    return {"by": "hook", "point": point, "then": then, "spec": {**spec, **more}}


def _kill_at(*points: str, largest: int = 3) -> Callable[[Random, int], dict[str, Any]]:
    """Somebody dies at one of ``points``, in turn."""

    def draw(random: Random, number: int) -> dict[str, Any]:
        point, action = points[number % len(points)], random.choice(KILLS)
        nth = random.randint(1, 5 * largest if point == "half removed" else largest)
        then = {"wait": True} if action == "kill launcher" else _then(random)
        return {"fault": _hook(point, nth, random, action, then), "note": f"{action} at: {point} ({nth})"}

    return draw


def _kill(target: str) -> Callable[[Random, int], dict[str, Any]]:
    def draw(random: Random, number: int) -> dict[str, Any]:
        chosen = target if target != "rank" else f"rank {random.randint(0, 1)}"
        early = target == "node" and number % 3 == 0
        at = {"seconds": round(0.5 + 5 * random.random(), 2)} if early else _moment(random)
        then = _then(random)
        if target == "launcher":  # the ranks live on, and hold the run folder
            then = {"relaunch": True} if number % 2 else {"wait": True}
        return {"fault": _signal(chosen, at, then), "note": f"kill -9 {chosen}, {at}"}

    return draw


def _ask(random: Random, number: int) -> dict[str, Any]:
    names = ("TERM", "HUP", "USR2", "INT", "XCPU", "USR1")
    name, target = names[number % len(names)], random.choice(["rank 0", "rank 1", "ranks"])
    fault = _signal(target, _moment(random), {"wait": True}, name, survives=True)
    return {"fault": fault, "note": f"SIG{name} to {target}"}


def _hang_up(random: Random, number: int) -> dict[str, Any]:
    """torchrun passes the signal on, also under nohup, and has a status of its own."""
    fault = _signal("launcher", _moment(random), {"wait": True}, "HUP", saves=True)
    return {"fault": fault, "note": "SIGHUP to the launcher"}


def _output_gone(random: Random, number: int) -> dict[str, Any]:
    action = ("no reader", "full output")[number % 2]
    fault = _hook("record half-written", random.randint(2, 15), random, action, {"wait": True})
    return {"fault": {**fault, "survives": True}, "note": f"standard output and error of rank 0: {action}"}


def _pause(random: Random, number: int) -> dict[str, Any]:
    seconds, steps = round(0.2 + 2.8 * random.random(), 2), {"steps": random.randint(1, 4)}
    if number % 3 == 2:
        point = random.choice(["shard half-written", "manifest made", "before rename", "half removed"])
        fault = _hook(point, random.randint(1, 3), random, "stop", steps, stop_seconds=seconds)
        return {"fault": fault, "note": f"SIGSTOP for {seconds} s at: {point}"}
    target = random.choice(["rank 0", "rank 1", "launcher", "node"])
    fault = _signal(target, _moment(random), steps, "STOP", stop_seconds=seconds)
    return {"fault": fault, "note": f"SIGSTOP of {target} for {seconds} s"}


def _freeze(random: Random, number: int) -> dict[str, Any]:
    made: dict[str, Any] = {"options": SHORT_TIMEOUT}
    if number % 3 == 2:
        fault = _signal("node", _moment(random), {"wait": True}, "STOP", stop_seconds=12.0, survives=True)
        return {**made, "fault": fault, "note": "SIGSTOP of launcher and ranks for 12 s, timeout 6 s"}
    target = f"rank {number % 3}"
    fault = _signal(target, _moment(random), {"wait": True}, "STOP", names_rank=True)
    return {**made, "fault": fault, "note": f"SIGSTOP of {target} for ever, timeout 6 s"}


def _full(random: Random, number: int) -> dict[str, Any]:
    left = int(random.random() * 550_000)  # a checkpoint has 570,000
    fault = {"by": "disk", "left": left, "at": _moment(random), "then": {"wait": True}}
    return {"fault": fault, "note": f"disk full but for {left:,} bytes"}


def _refusing(random: Random, number: int) -> dict[str, Any]:
    name = ("ENOSPC", "EIO", "EDQUOT")[number % 3]
    point = random.choice([p for p in POINTS if "half-written" in p or p in ("shard made", "shard flushed")])
    lasting = random.random() < 0.5
    late = point.startswith("record")
    nth = random.randint(1, 20 if late else 3) if not point.startswith(("config", "curve")) else 1
    fault = _hook(point, nth, random, "error", {"steps": 6}, errno=name, lasting=lasting)
    return {"fault": fault, "note": f"{name} {'from then on' if lasting else 'once'} at: {point} ({nth})"}


def _read_only(random: Random, number: int) -> dict[str, Any]:
    if number % 2:
        return {"rest": {"do": "read_only"}, "refused": True, "note": "read-only run folder at the launch"}
    fault = {"by": "read_only", "at": _moment(random), "then": {"wait": True}}
    return {"fault": fault, "note": "checkpoints/ becomes read-only"}


def _damage(random: Random, number: int) -> dict[str, Any]:
    # flip, truncate and delete of every file come first.
    every = [(name, form) for forms in (FORMS[:3], FORMS[3:]) for name in FILES for form in forms]
    name, form = every[number % len(every)]
    rest = {"do": "file", "name": name, "form": form, "place": random.random()}
    return {"rest": rest, "note": f"{form}: {name} of the newest"}


def _damage_all(random: Random, number: int) -> dict[str, Any]:
    drawn = _damage(random, random.randrange(3 * len(FILES)))
    return {
        "rest": {**drawn["rest"], "which": "all"},
        "refused": True,
        "note": drawn["note"].replace("the newest", "all"),
    }


def _pickle(random: Random, number: int) -> dict[str, Any]:
    where = ("table", "sealed table", "sealed tensors", "stray", "manifest", "config")[number % 6]
    rest, sealed = {"do": "pickle", "where": where}, where.startswith("sealed")
    return {"rest": rest, "refused": sealed, "note": f"malicious pickle: {where}"}


def _stray(random: Random, number: int) -> dict[str, Any]:
    if number % (len(STRAYS) + 1) == len(STRAYS):
        return {"rest": {"do": "empty_newer"}, "note": "an empty folder with a newer checkpoint's name"}
    what = STRAYS[number % (len(STRAYS) + 1)]
    return {"rest": {"do": "stray", "what": what, "seed": random.randrange(2**32)}, "note": what}


def _torn_curve(random: Random, number: int) -> dict[str, Any]:
    form = ("torn", "zeros", "noise")[number % 3]
    return {
        "rest": {"do": "metrics", "form": form, "place": random.random()},
        "note": f"metrics.jsonl ends with {form}",
    }


def _clock(random: Random, number: int) -> dict[str, Any]:
    days = random.choice([-3650, -400, -1, -0.04, 0.04, 1, 400, 3650])
    if number % 2:
        return {
            "rest": {"do": "times", "days": days, "shuffle": random.randrange(2**32)},
            "note": f"mtimes {days} days",
        }
    point, nth = random.choice(["record half-written", "shard flushed", "manifest made"]), random.randint(1, 3)
    seconds = {"seconds": days * 86400, "rank": random.choice([0, 1, "all"])}
    if point != "shard flushed":
        seconds["rank"] = 0
    fault = _hook(point, nth, random, "clock", {"steps": random.randint(2, 5)}, **seconds)
    return {"fault": fault, "note": f"clock of rank {seconds['rank']} jumps {days} days at: {point} ({nth})"}


def _overtaken(random: Random, number: int) -> dict[str, Any]:
    """A launch reads a checkpoint; meanwhile another finishes the run, or gets some checkpoints further."""
    then = {"steps": random.randint(10, 20)} if number % 2 else {"wait": True}
    point, nth = ("checkpoint read", random.randint(1, 3)) if number % 4 > 1 else ("before the lock", 1)
    fault = _hook(point, nth, random, "stop", then)
    fault["spec"]["rank"] = 0
    options = ("--parallel.timeout_seconds", "120")
    return {
        "fault": {**fault, "by": "overtaken"},
        "options": options,
        "note": f"stopped at: {point} ({nth}), the faster one: {then}",
    }


def _vanished(random: Random, number: int) -> dict[str, Any]:
    form = ("moved", "link", "empty")[number % 3]
    return {"rest": {"do": "vanish", "form": form}, "refused": True, "note": f"checkpoints/ is gone: {form}"}


def _irremovable(random: Random, number: int) -> dict[str, Any]:
    """Housekeeping fails, and only that: a link in the place of an old checkpoint, a file that may not be removed."""
    if number % 4 == 3:
        return {"rest": {"do": "archive"}, "note": "a link in the place of the oldest checkpoint"}
    point = ("half removed", "before removal", "folder removed")[number % 4]
    nth = random.randint(1, 3)
    fault = _hook(point, nth, random, "error", {"steps": 6}, errno="EPERM", lasting=False)
    return {"fault": fault, "note": f"EPERM at: {point} ({nth})"}


RESUME_POINTS = (
    "checkpoint read",
    "before the lock",
    "config.yaml half-written",
    "curve half-written",
    "before curve replaced",
)
EARLY_POINTS = (*RESUME_POINTS, "half removed", "folder removed", "evaluation", "record half-written")
"""May come before a step is told of: a run that begins removes what a killed one has left under temporary names, and
makes an evaluation that it broke off."""
KINDS: dict[str, tuple[int, str, Callable[[Random, int], dict[str, Any]]]] = {
    "kill-rank": (16, "kill -9 of a rank, at any time", _kill("rank")),
    "kill-ranks": (10, "kill -9 of all ranks, at any time", _kill("ranks")),
    "kill-launcher": (10, "kill -9 of the launcher, at any time", _kill("launcher")),
    "kill-node": (15, "kill -9 of launcher and ranks, at any time", _kill("node")),
    "shard": (18, "kill during a shard's write", _kill_at("shard half-written", "shard made", "shard flushed")),
    "manifest": (
        18,
        "kill between shards and manifest",
        _kill_at(*[p for p in POINTS if p.startswith(("table", "hf", "manifest"))]),
    ),
    "rename": (12, "kill at the rename", _kill_at("before rename", "after rename", "parent flushed")),
    "retention": (
        12,
        "kill while old checkpoints are removed",
        _kill_at("half removed", "before removal", "removal begun", "folder removed"),
    ),
    "evaluation": (8, "kill during an evaluation", _kill_at("evaluation", largest=5)),
    "record": (5, "kill while a record is written", _kill_at("record half-written", largest=15)),
    "resume": (8, "kill while a run resumes", _kill_at(*RESUME_POINTS, largest=1)),
    "overtaken": (4, "a second launch, overtaken by the first", _overtaken),
    "stop": (6, "asked to stop (TERM, HUP, USR2, INT, XCPU, USR1)", _ask),
    "hangup": (2, "SIGHUP to the launcher", _hang_up),
    "output": (4, "standard output without a reader or on a full disk", _output_gone),
    "pause": (8, "SIGSTOP, and on after some seconds", _pause),
    "freeze": (6, "SIGSTOP for longer than the timeout", _freeze),
    "disk-full": (8, "disk full (a small tmpfs)", _full),
    "refusing-disk": (10, "writes that fail (ENOSPC, EIO, EDQUOT)", _refusing),
    "read-only": (4, "read-only folder", _read_only),
    "damage": (22, "a damaged file in the newest checkpoint", _damage),
    "damage-all": (4, "a damaged file in every checkpoint", _damage_all),
    "pickle": (6, "malicious pickle", _pickle),
    "stray": (11, "garbage in checkpoints/", _stray),
    "curve": (3, "torn or garbled metrics.jsonl", _torn_curve),
    "clock": (8, "clock jumps", _clock),
    "vanished": (3, "checkpoints/ moved away, unmounted, a link to nowhere", _vanished),
    "irremovable": (4, "old checkpoints that cannot be removed", _irremovable),
}
"""Kind: (share of the cases, title, what draws one)."""


def draw(kind: str, number: int, seed: int) -> Case:
    """The case ``kind.number`` of ``seed``."""
    return Case(f"{kind}.{number}", kind, **KINDS[kind][2](Random(f"{seed} {kind} {number}"), number))


def catalogue(count: int, seed: int) -> list[Case]:
    """``count`` cases of all kinds by their shares, at least one of each, in an order drawn from ``seed``."""
    total = sum(weight for weight, *_ in KINDS.values())
    counts = {kind: max(1, count * weight // total) for kind, (weight, *_) in KINDS.items()}
    by_lack = sorted(KINDS, key=lambda kind: counts[kind] / KINDS[kind][0])
    for position in range(max(0, count - sum(counts.values()))):
        counts[by_lack[position % len(by_lack)]] += 1
    cases = [draw(kind, number, seed) for kind, number_of in counts.items() for number in range(number_of)]
    Random(f"{seed} order").shuffle(cases)
    return cases
