"""`pal doctor [CONFIG]`: runs a job of a few seconds on every node and prints one table of the problems of each node.

A node reports its own state before it connects to others: one that cannot connect is not taken for one that is down."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import ExperimentConfig, load_config
from pipeline.core import provenance
from pipeline.core.arguments import add_config, add_json, write_results
from pipeline.core.console import format_table, logger
from pipeline.core.errors import EXIT_FAILURE, UserError, run_command
from pipeline.core.feature_contract import load_contract, require_encoders
from pipeline.core.ranks import Ranks, is_rank, read_ranks
from pipeline.core.units import GIB
from pipeline.launch import rank_process, supervisor
from pipeline.tracking import writer

MIN_DISK_GIB = 20.0
MIN_SHARED_MEMORY_GIB = 1.0  # Docker's default of 64 MiB holds neither NCCL's buffers nor a loader's batches
MAX_CLOCK_OFFSET_S = 1.0  # beyond it, the times in logs and failure records do not show what happened first
ALL_REDUCE_MIB = {"cpu": 16, "cuda": 256}
ALL_REDUCES = 5
SHARED_MEMORY = Path("/dev/shm")

Node = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    config = load_config(ExperimentConfig, arguments.config, arguments.overrides) if arguments.config else None
    if is_rank():
        return run_rank(config, read_ranks(), arguments.timeout)
    on_gpu, nproc = supervisor.devices(arguments.nproc)
    hosts = {"localhost": nproc}
    if arguments.hostfile:
        hosts, nproc = supervisor.read_hostfile(arguments.hostfile, arguments.nproc), arguments.nproc
    experiment = [arguments.config, *arguments.overrides] if arguments.config else []
    records: list[Node] = []
    with tempfile.TemporaryDirectory() as folder:
        code, message = supervisor.supervise(
            [*experiment, f"--timeout={arguments.timeout}"],
            Path(folder),
            supervisor.Placement(nproc, on_gpu, arguments.hostfile),
            module="pipeline.doctor",
            on_line=lambda line: records.append(json.loads(line)),
        )
    nodes = merge_records(records, hosts)
    checks = run_checks(nodes, hosts)
    problems = [{"check": name, **problem} for name, _, check_problems in checks for problem in check_problems]
    print(table(checks, len(hosts)))
    if code and not problems:
        problems.append({"check": "launcher", "host": "", "fault": message})
    if code and all(problem["check"] in ("answer", "launcher") for problem in problems):
        logger.error(message)
    write_results({"nodes": nodes, "problems": problems}, arguments.json)
    return EXIT_FAILURE if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pal doctor",
        description="Check the machines before a run: versions, GPUs, disks, clocks, tracker, features, and a timed "
        "all-reduce under the launcher. With CONFIG, also check the output folder, features and tracker of that "
        "experiment. Exits with code 1 if something is wrong.",
    )
    add_config(parser, optional=True)
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks per host (default: one per GPU, else 1)")
    parser.add_argument("--hostfile", type=Path, metavar="F", help="DeepSpeed hostfile (one `HOST slots=N` per line)")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds to wait for nodes (120)")
    add_json(parser)
    return parser


# ---- on every node ------------------------------------------------------------------------------------------------


def run_rank(config: ExperimentConfig | None, ranks: Ranks, timeout_s: float) -> int:
    """Inspects this node (on its first rank only), connects to the other ranks and times an all-reduce with them."""
    represents_node = ranks.local_rank == 0
    if represents_node:
        _report(ranks, inspect_node(config, ranks))
    try:
        connection = _connect(config, ranks, timeout_s)
    except Exception as error:  # raised by torch, NCCL or gloo; the table shows it
        _report(ranks, {"all_reduce_fault": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
        return EXIT_FAILURE
    if represents_node:
        _report(ranks, connection)
    return 0


def _report(ranks: Ranks, values: Mapping[str, Any]) -> None:
    rank_process.print_to_parent(json.dumps({"rank": ranks.rank, **values}))


def inspect_node(config: ExperimentConfig | None, ranks: Ranks) -> Node:
    """Returns the state of this node. Each `*_fault` is a text, or None if nothing is wrong."""
    import torch

    gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    memory = [torch.cuda.mem_get_info(n) for n in range(len(gpus))]
    existing = _existing(Path.cwd() if config is None else config.output.absolute())
    node: Node = {
        "ranks": ranks.local_world_size,
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **provenance.package_versions()},
        "code": provenance.git_state().get("git.commit", "")[:12],
        "gpus": [f"{gpu.name} {gpu.total_memory / GIB:.0f} GiB" for gpu in gpus],
        "busy_gpus": [n for n, (free, total) in enumerate(memory) if free < 0.9 * total],
        "folder": str(existing),
        "disk_gib": round(shutil.disk_usage(existing).free / GIB, 1),
        "disk_fault": None if os.access(existing, os.W_OK) else f"{existing} is not writable",
        "shared_memory_gib": round(shutil.disk_usage(SHARED_MEMORY).free / GIB, 1),
    }
    if config is not None:
        node["features_fault"] = _fault(lambda: _read_features(config))
        node["tracker_fault"] = _fault(lambda: writer.reach(config.tracking, config.output))
    return node


def _existing(folder: Path) -> Path:
    """Returns the folder, or its nearest ancestor that exists."""
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())


def _fault(check: Callable[[], None]) -> str | None:
    try:
        check()
    except Exception as error:  # clients of object stores and servers raise errors of many libraries
        return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def _read_features(config: ExperimentConfig) -> None:
    for folder in filter(None, (config.data.train, config.data.validation)):
        require_encoders(load_contract(folder), config.model.encoders, folder)


def _connect(config: ExperimentConfig | None, ranks: Ranks, timeout_s: float) -> Node:
    """Returns the clock at a moment common to all nodes, whether they share the output folder, and all-reduce times."""
    import torch

    from pipeline.engine import init_process_group, leave_process_group, on_gpu

    init_process_group(ranks, timeout_s)
    kind = "cuda" if on_gpu() else "cpu"
    device = torch.device(kind, ranks.local_rank) if kind == "cuda" else torch.device(kind)
    torch.distributed.barrier()
    torch.distributed.barrier()  # the first one also opens connections, so ranks leave it at different times
    connection: Node = {"clock_s": time.time(), "sharing_fault": None}
    if config is not None and not _shares(config.output.absolute(), ranks):
        connection["sharing_fault"] = f"does not see what rank 0 writes beside {config.output}"
    length = ALL_REDUCE_MIB[kind] * 2**18
    seconds = []
    for _ in range(ALL_REDUCES):
        numbers = torch.ones(length, device=device)
        torch.distributed.barrier()
        started = time.perf_counter()
        torch.distributed.all_reduce(numbers)
        is_correct = bool((numbers == ranks.world_size).all())  # waits for the device
        seconds.append(time.perf_counter() - started)
        if not is_correct:
            raise RuntimeError(f"the sum over {ranks.world_size} ranks is wrong")
    sent_bytes = 2 * (ranks.world_size - 1) / ranks.world_size * length * 4  # by each rank of a ring
    gb_s = round(sent_bytes / min(seconds) / 1e9, 2)
    connection["all_reduce"] = {"mib": ALL_REDUCE_MIB[kind], "s": min(seconds), "gb_s": gb_s}
    leave_process_group()
    return connection


def _shares(output: Path, ranks: Ranks) -> bool:
    """Returns whether this rank sees a folder that rank 0 creates at the place of the output."""
    import torch

    from pipeline.engine import from_main_rank

    folder = _existing(output)
    written = from_main_rank(tempfile.mkdtemp(prefix=".pal-doctor-", dir=folder) if ranks.is_main else None)
    is_shared = Path(written).is_dir()
    torch.distributed.barrier()
    if ranks.is_main:
        Path(written).rmdir()
    return is_shared


# ---- the table ----------------------------------------------------------------------------------------------------

Problem = dict[str, str]
Check = tuple[str, str, list[Problem]]  # name, value on most nodes, problems with their hosts


def merge_records(records: Sequence[Node], hosts: Mapping[str, int]) -> dict[str, Node]:
    """Merges the records of all ranks of each host; a host that did not answer has an empty record."""
    host_of_rank = [host for host, ranks in hosts.items() for _ in range(ranks)]
    nodes: dict[str, Node] = {host: {} for host in hosts}
    for record in records:
        nodes[host_of_rank[record["rank"]]] |= {key: value for key, value in record.items() if key != "rank"}
    return nodes


def run_checks(nodes: Mapping[str, Node], hosts: Mapping[str, int]) -> list[Check]:
    """Returns every check, each over the nodes that could report on it."""
    answering = {host: node for host, node in nodes.items() if "versions" in node}
    connected = {host: node for host, node in nodes.items() if "clock_s" in node}
    count = f"{len(answering)} of {len(hosts)} nodes"
    answer = _checked("answer", count, nodes, lambda node: None if node else "does not answer")
    if not answering:
        return [answer]
    packages = sorted({name for node in answering.values() for name in node["versions"]})
    folders = ", ".join({node["folder"] for node in answering.values()})
    checks = [
        answer,
        *(_equal(name, {host: node["versions"].get(name) for host, node in answering.items()}) for name in packages),
        _equal("code", {host: node["code"] or None for host, node in answering.items()}),
        _equal("GPUs", {host: _gpu_summary(node["gpus"]) for host, node in answering.items()}),
        _checked("ranks", f"{sum(hosts.values())}", answering, _gpu_fault),
        _at_least("disk", "disk_gib", MIN_DISK_GIB, answering),
        _at_least(str(SHARED_MEMORY), "shared_memory_gib", MIN_SHARED_MEMORY_GIB, answering),
        _checked("writing", folders, answering, lambda node: node["disk_fault"]),
    ]
    if any("features_fault" in node for node in answering.values()):
        checks.append(_checked("features", "readable", answering, lambda node: node["features_fault"]))
        checks.append(_checked("tracker", "reachable", answering, lambda node: node["tracker_fault"]))
    if connected:
        shared = _checked("shared output", "the same", connected, lambda node: node["sharing_fault"])
        checks += [shared, _clocks(connected)]
    checks.append(_checked("all-reduce", _speed(connected), answering, lambda node: node.get("all_reduce_fault")))
    return checks


def _checked(name: str, value: str, nodes: Mapping[str, Node], fault: Callable[[Node], str | None]) -> Check:
    faults = {host: fault(node) for host, node in nodes.items()}
    return name, value, [{"host": host, "fault": text} for host, text in faults.items() if text]


def _equal(name: str, values: Mapping[str, str | None]) -> Check:
    common, _ = Counter(values.values()).most_common(1)[0]
    problems = [{"host": host, "fault": f"has {value or 'none'}"} for host, value in values.items() if value != common]
    return name, common or "none", problems


def _at_least(name: str, key: str, least: float, nodes: Mapping[str, Node]) -> Check:
    def fault(node: Node) -> str | None:
        return f"has {node[key]:g} GiB free, needs {least:g}" if node[key] < least else None

    return _checked(name, f"{min(node[key] for node in nodes.values()):g} GiB free or more", nodes, fault)


def _gpu_fault(node: Node) -> str | None:
    if 0 < len(node["gpus"]) < node["ranks"]:
        return f"has {len(node['gpus'])} GPUs for {node['ranks']} ranks"
    return f"other processes use GPU {', '.join(map(str, node['busy_gpus']))}" if node["busy_gpus"] else None


def _gpu_summary(gpus: Sequence[str]) -> str | None:
    return ", ".join(f"{number} x {name}" for name, number in Counter(gpus).items()) or None


def _clocks(nodes: Mapping[str, Node]) -> Check:
    times = sorted(node["clock_s"] for node in nodes.values())
    median = times[len(times) // 2]

    def fault(node: Node) -> str | None:
        offset = node["clock_s"] - median
        return f"is {offset:+.1f} s off" if abs(offset) > MAX_CLOCK_OFFSET_S else None

    return _checked("clocks", f"{times[-1] - times[0]:.3f} s apart", nodes, fault)


def _speed(nodes: Mapping[str, Node]) -> str:
    if not nodes:
        return ""
    slowest = max((node["all_reduce"] for node in nodes.values()), key=lambda timing: timing["s"])
    return f"{slowest['mib']} MiB in {slowest['s'] * 1000:.3g} ms, {slowest['gb_s']:g} GB/s"


def table(checks: Sequence[Check], num_nodes: int) -> str:
    """Returns the checks as a table: a row per check and, if several hosts have a problem, a further row for each."""
    lines = [("check", "this machine" if num_nodes == 1 else f"{num_nodes} nodes", "problem")]
    for name, value, problems in checks:
        texts = [f"{problem['host']}: {problem['fault']}" for problem in problems] or ["-"]
        lines.append((name, value, texts[0]))
        lines += [("", "", text) for text in texts[1:]]
    return format_table(lines)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
