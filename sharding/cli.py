"""`qwen2-jax plan`: what a run takes and how fast it can be, before anyone pays for it."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from qwen2_jax.command import exit_code, parse
from sharding.mesh import MeshSpec
from sharding.planner import report
from sharding.planner.advice import ways_to_fit
from sharding.planner.chips import parse_topology
from sharding.planner.estimate import Estimate, as_json, estimate
from sharding.planner.request import Optimizer, Remat, Request, Task, checked, read_config
from sharding.planner.search import search

if TYPE_CHECKING:  # only: the formula must not wait for JAX
    from jax.sharding import Mesh

    from sharding.planner.compiled import Compiled

TOP = 10
"""Candidates of a search to print, unless asked for more or fewer."""
_COMPILED = 3
"""Candidates of a search that are compiled: each takes minutes."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Plan a run on TPUs or GPUs that need not be there: memory of a device, work, traffic, and what limits the speed.

    By formula, in less than a second. --compile also builds the real program for the topology, which takes minutes and
    needs libtpu but no TPU. Exit status 2 if the run does not fit.
    """

    model: Annotated[str, arg(metavar="NAME|PATH")]
    """Published model, as qwen2-72b, or a folder with a config.json."""
    topology: Annotated[str, arg(metavar="CHIP:SHAPE")]
    """TPU slice, as v5p:4x4x8 or v5e:16x16, or GPUs, as H100:16. Chips: v4, v5e, v5p, v6e, H100, H200."""
    slices: Annotated[int, arg(metavar="N")] = 1
    """How many such TPU slices; `data`, then `fsdp`, goes across them."""
    mesh: Annotated[str | None, arg(metavar="AXIS=N,...", help_behavior_hint="(with --search: all are tried)")] = None
    """How devices are used: data, fsdp, expert, context, tensor; -1 for one of them takes what is left."""
    task: Task = "train"
    """A training step, the prefill of prompts, or one decoding step."""
    batch: Annotated[int | None, arg(metavar="N", help_behavior_hint="(with --search: several are tried)")] = None
    """Rows, all devices together."""
    seq: Annotated[int, arg(metavar="N")] = 4096
    """Tokens of each row; when decoding, those in the cache."""
    remat: Annotated[
        Remat | None,
        arg(
            metavar="{none,projections,attention,full,offload}",
            help_behavior_hint="(default: full; with --search: all are tried)",
        ),
    ] = None
    """What training keeps of each layer for the backward pass; the rest is computed again."""
    optimizer: Annotated[
        Optimizer | None, arg(metavar="{adamw,adamw-bf16,sgd}", help_behavior_hint="(default: adamw)")
    ] = None
    """Of training; adamw-bf16 keeps the first moment in bfloat16."""
    compile: bool = False
    """Also compile for the topology, and print what XLA says beside the formula; with --search, the best three."""
    search: bool = False
    """Rank all meshes, batches and remat policies that fit, save for those that are given."""
    top: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 10)")] = None
    """Candidates of a search to print."""
    json: bool = False
    """Print one JSON object: bytes, seconds, operations."""

    def __post_init__(self):
        if self.top is not None and not self.search:
            raise ValueError("--top is of a search; add --search, or leave it out")
        if self.top is not None and self.top < 1:
            raise ValueError(f"--top must be 1 or more, got {self.top}")
        for flag, value in (("--remat", self.remat), ("--optimizer", self.optimizer)):
            if value is not None and self.task != "train":
                raise ValueError(f"{flag} is of training, got --task {self.task}; leave it out")


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    options: Options = parse(Options, argv or ["--help"], prog="qwen2-jax plan")
    return _search(options) if options.search else _plan(options)


def _request(options: Options, mesh: str, batch: int) -> Request:
    """Not checked yet."""
    config = read_config(options.model)
    place = parse_topology(options.topology, options.slices)
    spec, remat, optimizer = MeshSpec.parse(mesh), options.remat or "full", options.optimizer or "adamw"
    return Request(options.model, config, place, spec, options.task, batch, options.seq, remat, optimizer)


def plan(options: Options) -> Estimate:
    """The estimate that a command line asks for. Raises ValueError as `checked`, and for what is missing."""
    if options.mesh is None:
        raise ValueError("--mesh is missing: give one, as --mesh fsdp=-1, or let --search try all")
    if options.batch is None:
        raise ValueError("--batch is missing: give the rows of all devices together, or let --search try several")
    return estimate(checked(_request(options, options.mesh, options.batch)))


def ranked(options: Options) -> list[Estimate]:
    """The candidates that a search finds, best first. Raises ValueError as `MeshSpec.resolve` and `search`."""
    request = _request(options, options.mesh or "", options.batch or 1)
    mesh = None if options.mesh is None else [request.mesh.resolve(request.topology.devices)]
    batch = None if options.batch is None else [options.batch]
    remat = None if options.remat is None else [options.remat]
    return search(request, mesh, batch, remat)


def _plan(options: Options) -> int:
    result = plan(options)
    if not options.json:
        _show(result)
    compiled = _compiled(result.request, quiet=options.json) if options.compile else None
    if options.json:
        print(json.dumps(_as_json(result, compiled)))
    elif compiled is not None:
        _show_compiled(result, compiled)
    if not result.fits:
        ways = ways_to_fit(result.request)
        advice = f"it would with {' or '.join(ways)}" if ways else "no single change makes it fit; try --search"
        raise ValueError(f"the run does not fit; {advice}")
    return 0


def _search(options: Options) -> int:
    found = ranked(options)
    best = found[: options.top or TOP]
    if not options.json:
        print(f"{options.model}: {options.task}, rows of {options.seq:,} tokens on {best[0].request.topology}")
        report.show(report.search_sheet(best))
    programs = []
    for result in best[: _COMPILED if options.compile else 0]:
        programs.append(_compiled(result.request, quiet=options.json))
        if not options.json:
            print(report.headline(result.request))
            _show_compiled(result, programs[-1])
    if options.json:
        pairs = itertools.zip_longest(best, programs)
        print(json.dumps({"candidates": len(found), "best": [_as_json(*pair) for pair in pairs]}))
    return 0


def _compiled(request: Request, quiet: bool) -> "Compiled":
    from sharding.planner.compiled import compile_request

    if not quiet:
        print(f"compiling for {request.topology} ...", file=sys.stderr, flush=True)
    return compile_request(request, _program)


def _program(request: Request, mesh: "Mesh") -> Any:
    # Imported when it is called: these import JAX, which must not start before its environment is set.
    if request.training:
        from train.program import training_program as program
    else:
        from sharding.planner.programs import serving_program as program
    return program(request, mesh)


def _as_json(result: Estimate, compiled: "Compiled | None") -> dict[str, Any]:
    return as_json(result) | {"compiled": None if compiled is None else dataclasses.asdict(compiled)}


def _show(result: Estimate) -> None:
    print(report.headline(result.request))
    report.show(report.memory_sheet(result))
    report.show(report.time_sheet(result))
    print(*report.verdict(result), sep="\n")


def _show_compiled(result: Estimate, compiled: "Compiled") -> None:
    report.show(report.beside_xla_sheet(result, compiled))
    report.show(report.collectives_sheet(compiled))
    for warning in compiled.warnings:
        print(f"warning: {warning}")
