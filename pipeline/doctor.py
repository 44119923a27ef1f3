"""`pal doctor [CONFIG]`: starts a job of seconds on every node, and says in one table what is wrong where.

A node speaks before it meets the others, so that one which cannot be met is told from one which does not answer."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import ExperimentConfig, load_config
from pipeline.core import provenance
from pipeline.core.console import format_table
from pipeline.core.errors import EXIT_FAILURE, UserError, run_command
from pipeline.core.feature_contract import load_contract, require_encoders
from pipeline.core.ranks import Ranks, read_ranks
from pipeline.launch import rank_process, supervisor
from pipeline.tracking import writer

MIN_DISK_GIB = 20.0
MIN_SHARED_MEMORY_GIB = 1.0  # Docker's default of 64 MiB holds neither NCCL's buffers nor a loader's batches
MAX_CLOCK_S = 1.0  # further apart, the times of logs and of failures do not say what came first
ALL_REDUCE_MIB = {"cpu": 16, "cuda": 256}
ALL_REDUCES = 5
SHARED_MEMORY = Path("/dev/shm")

Node = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    config = load_config(ExperimentConfig, arguments.config, arguments.overrides) if arguments.config else None
    if "RANK" in os.environ:
        return run_rank(config, read_ranks(), arguments.timeout)
    on_gpu, nproc = supervisor.devices(arguments.nproc)
    hosts = (
        supervisor.read_hostfile(arguments.hostfile, arguments.nproc) if arguments.hostfile else {"localhost": nproc}
    )
    given = [arguments.config, *arguments.overrides] if arguments.config else []
    records: list[Node] = []
    with tempfile.TemporaryDirectory() as folder:
        code, message = supervisor.supervise(
            [*given, f"--timeout={arguments.timeout}"],
            Path(folder),
            nproc=arguments.nproc if arguments.hostfile else nproc,
            hostfile=arguments.hostfile,
            on_gpu=on_gpu,
            module="pipeline.doctor",
            show=lambda line: records.append(json.loads(line)),
        )
    nodes = gather(records, hosts)
    rows = examine(nodes, hosts)
    problems = [{"check": check, **problem} for check, _, found in rows for problem in found]
    print(table(rows, len(hosts)))
    if code and not problems:
        problems.append({"check": "launcher", "host": "", "fault": message})
    if code and all(problem["check"] in ("answer", "launcher") for problem in problems):
        print(f"pal: {message}", file=sys.stderr)
    if arguments.json:
        figures = {"nodes": nodes, "problems": problems}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return EXIT_FAILURE if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal doctor",
        description="Check the machines before a run: versions, GPUs, disks, clocks, tracker, features, and a timed "
        "all-reduce under the launcher. Exits with 1 when something is wrong.",
    )
    parser.add_argument("config", nargs="?", help="an experiment, whose output, features and tracker are checked too")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the config")
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks on each machine (default: its GPUs, or 1)")
    parser.add_argument("--hostfile", type=Path, metavar="F", help="machines, one `HOST slots=N` a line")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="to wait for other nodes (120)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found here as well")
    return parser


# ---- on every node ------------------------------------------------------------------------------------------------


def run_rank(config: ExperimentConfig | None, ranks: Ranks, timeout_s: float) -> int:
    """Looks around on this node (its first rank does), meets the other ranks, reduces with them."""
    speaks = ranks.local_rank == 0
    if speaks:
        _tell(ranks, look_around(config, ranks))
    try:
        met = _meet(config, ranks, timeout_s)
    except Exception as error:  # of torch, NCCL or gloo; the table shows it
        _tell(ranks, {"all_reduce_fault": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
        return EXIT_FAILURE
    if speaks:
        _tell(ranks, met)
    return 0


def _tell(ranks: Ranks, values: Mapping[str, Any]) -> None:
    rank_process.report(json.dumps({"rank": ranks.rank, **values}))


def look_around(config: ExperimentConfig | None, ranks: Ranks) -> Node:
    """What one node finds on itself. Faults are texts; None means that nothing is wrong."""
    import torch

    gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    memory = [torch.cuda.mem_get_info(n) for n in range(len(gpus))]
    existing = _existing(Path.cwd() if config is None else config.output.absolute())
    node: Node = {
        "ranks": ranks.local_world_size,
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **provenance.package_versions()},
        "code": provenance.git_state().get("git.commit", "")[:12],
        "gpus": [f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus],
        "busy_gpus": [n for n, (free, total) in enumerate(memory) if free < 0.9 * total],
        "folder": str(existing),
        "disk_gib": round(shutil.disk_usage(existing).free / 2**30, 1),
        "disk_fault": None if os.access(existing, os.W_OK) else f"{existing} cannot be written",
        "shared_memory_gib": round(shutil.disk_usage(SHARED_MEMORY).free / 2**30, 1),
    }
    if config is not None:
        node["features_fault"] = _fault(lambda: _read_features(config))
        node["tracker_fault"] = _fault(lambda: writer.reach(config.tracking))
    return node


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())


def _fault(check: Callable[[], None]) -> str | None:
    try:
        check()
    except Exception as error:  # a store's or server's client raises errors of many libraries
        return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def _read_features(config: ExperimentConfig) -> None:
    for folder in filter(None, (config.data.train, config.data.validation)):
        require_encoders(load_contract(folder), config.model.encoders, folder)


def _meet(config: ExperimentConfig | None, ranks: Ranks, timeout_s: float) -> Node:
    """The clock at a moment that all nodes share, whether they share the output folder, and the all-reduce."""
    import torch

    from pipeline.engine import init_process_group, leave_process_group, on_gpu

    init_process_group(ranks, timeout_s)
    kind = "cuda" if on_gpu() else "cpu"
    device = torch.device(kind, ranks.local_rank) if kind == "cuda" else torch.device(kind)
    torch.distributed.barrier()
    torch.distributed.barrier()  # the first one also opens connections, and ranks leave it at different times
    met: Node = {"clock_s": time.time(), "sharing_fault": None}
    if config is not None and not _shares(config.output.absolute(), ranks):
        met["sharing_fault"] = f"does not see what rank 0 writes beside {config.output}"
    length = ALL_REDUCE_MIB[kind] * 2**18
    seconds = []
    for _ in range(ALL_REDUCES):
        numbers = torch.ones(length, device=device)
        torch.distributed.barrier()
        started = time.perf_counter()
        torch.distributed.all_reduce(numbers)
        right = bool((numbers == ranks.world_size).all())  # waits for the device
        seconds.append(time.perf_counter() - started)
        if not right:
            raise RuntimeError(f"the sum over {ranks.world_size} ranks is wrong")
    sent = 2 * (ranks.world_size - 1) / ranks.world_size * length * 4  # bytes, by a ring
    met["all_reduce"] = {"mib": ALL_REDUCE_MIB[kind], "s": min(seconds), "gb_s": round(sent / min(seconds) / 1e9, 2)}
    leave_process_group()
    return met


def _shares(output: Path, ranks: Ranks) -> bool:
    """Whether this rank sees what rank 0 makes where the output will be."""
    import torch

    from pipeline.engine import from_main_rank

    folder = _existing(output)
    written = from_main_rank(tempfile.mkdtemp(prefix=".pal-doctor-", dir=folder) if ranks.is_main else None)
    seen = Path(written).is_dir()
    torch.distributed.barrier()
    if ranks.is_main:
        Path(written).rmdir()
    return seen


# ---- the table ----------------------------------------------------------------------------------------------------

Problem = dict[str, str]
Check = tuple[str, str, list[Problem]]  # its name, what most nodes have, what is wrong where


def gather(records: Sequence[Node], hosts: Mapping[str, int]) -> dict[str, Node]:
    """Everything that the ranks of each host told; nothing for a host that is silent."""
    host_of = [host for host, ranks in hosts.items() for _ in range(ranks)]
    nodes: dict[str, Node] = {host: {} for host in hosts}
    for record in records:
        nodes[host_of[record["rank"]]] |= {key: value for key, value in record.items() if key != "rank"}
    return nodes


def examine(nodes: Mapping[str, Node], hosts: Mapping[str, int]) -> list[Check]:
    """Every check, over the nodes that could make it."""
    spoke = {host: node for host, node in nodes.items() if "versions" in node}
    met = {host: node for host, node in nodes.items() if "clock_s" in node}
    answers = _checked("answer", f"{len(spoke)} of {len(hosts)} nodes", nodes, lambda n: None if n else "says nothing")
    if not spoke:
        return [answers]
    packages = sorted({name for node in spoke.values() for name in node["versions"]})
    checks = [
        answers,
        *(_equal(name, {host: node["versions"].get(name) for host, node in spoke.items()}) for name in packages),
        _equal("code", {host: node["code"] or None for host, node in spoke.items()}),
        _equal("GPUs", {host: _count(node["gpus"]) for host, node in spoke.items()}),
        _checked("ranks", f"{sum(hosts.values())}", spoke, _crowded),
        _at_least("disk", "disk_gib", MIN_DISK_GIB, spoke),
        _at_least(str(SHARED_MEMORY), "shared_memory_gib", MIN_SHARED_MEMORY_GIB, spoke),
        _checked("writing", ", ".join({node["folder"] for node in spoke.values()}), spoke, lambda n: n["disk_fault"]),
    ]
    if any("features_fault" in node for node in spoke.values()):
        checks += [
            _checked("features", "readable", spoke, lambda n: n["features_fault"]),
            _checked("tracker", "reachable", spoke, lambda n: n["tracker_fault"]),
        ]
    if met:
        checks += [_checked("shared output", "the same", met, lambda n: n["sharing_fault"]), _clocks(met)]
    checks.append(_checked("all-reduce", _speed(met), spoke, lambda n: n.get("all_reduce_fault")))
    return checks


def _checked(name: str, value: str, nodes: Mapping[str, Node], fault: Callable[[Node], str | None]) -> Check:
    faults = {host: fault(node) for host, node in nodes.items()}
    return name, value, [{"host": host, "fault": text} for host, text in faults.items() if text]


def _equal(name: str, values: Mapping[str, str | None]) -> Check:
    common, _ = Counter(values.values()).most_common(1)[0]
    other = [{"host": host, "fault": f"has {value or 'none'}"} for host, value in values.items() if value != common]
    return name, common or "none", other


def _at_least(name: str, key: str, least: float, nodes: Mapping[str, Node]) -> Check:
    def fault(node: Node) -> str | None:
        return f"has {node[key]:g} GiB free, {least:g} are needed" if node[key] < least else None

    return _checked(name, f"{min(node[key] for node in nodes.values()):g} GiB free or more", nodes, fault)


def _crowded(node: Node) -> str | None:
    if 0 < len(node["gpus"]) < node["ranks"]:
        return f"has {len(node['gpus'])} GPUs for {node['ranks']} ranks"
    return f"others use GPU {', '.join(map(str, node['busy_gpus']))}" if node["busy_gpus"] else None


def _count(gpus: Sequence[str]) -> str | None:
    return ", ".join(f"{number} x {name}" for name, number in Counter(gpus).items()) or None


def _clocks(nodes: Mapping[str, Node]) -> Check:
    times = sorted(node["clock_s"] for node in nodes.values())
    middle = times[len(times) // 2]

    def fault(node: Node) -> str | None:
        off = node["clock_s"] - middle
        return f"is {off:+.1f} s off" if abs(off) > MAX_CLOCK_S else None

    return _checked("clocks", f"{times[-1] - times[0]:.3f} s apart", nodes, fault)


def _speed(nodes: Mapping[str, Node]) -> str:
    if not nodes:
        return ""
    slowest = max((node["all_reduce"] for node in nodes.values()), key=lambda figures: figures["s"])
    return f"{slowest['mib']} MiB in {slowest['s'] * 1000:.3g} ms, {slowest['gb_s']:g} GB/s"


def table(checks: Sequence[Check], num_nodes: int) -> str:
    """A line for each check; what is wrong stands behind it, a line for each host."""
    lines = [("check", "this machine" if num_nodes == 1 else f"{num_nodes} nodes", "wrong")]
    for name, value, problems in checks:
        texts = [f"{problem['host']}: {problem['fault']}" for problem in problems] or ["-"]
        lines.append((name, value, texts[0]))
        lines += [("", "", text) for text in texts[1:]]
    return format_table(lines)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
