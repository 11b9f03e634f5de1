"""What would make a run fit that does not."""

import dataclasses
from collections.abc import Iterator

from sharding.mesh import MeshSpec
from sharding.planner.chips import grown
from sharding.planner.estimate import estimate
from sharding.planner.request import REMATS, Request, checked
from sharding.planner.search import search


def ways_to_fit(request: Request) -> list[str]:
    """Single changes of a request, as a command line spells them, after which it fits: one of each kind that helps."""
    changes = (_remats, _optimizers, _batches, _meshes, _chips)
    return [text for change in changes for text in [_first_that_fits(change(request))] if text]


def _first_that_fits(candidates: Iterator[tuple[str, Request]]) -> str | None:
    for text, candidate in candidates:
        try:
            if estimate(checked(candidate)).fits:
                return text
        except ValueError:  # it does not divide
            continue
    return None


def _remats(request: Request) -> Iterator[tuple[str, Request]]:
    if request.training:
        for remat in REMATS[REMATS.index(request.remat) + 1 :]:
            yield f"--remat {remat}", dataclasses.replace(request, remat=remat)


def _optimizers(request: Request) -> Iterator[tuple[str, Request]]:
    if request.training and request.optimizer == "adamw":
        yield "--optimizer adamw-bf16", dataclasses.replace(request, optimizer="adamw-bf16")


def _batches(request: Request) -> Iterator[tuple[str, Request]]:
    batch = request.batch // 2
    while batch:
        yield f"--batch {batch}", dataclasses.replace(request, batch=batch)
        batch //= 2


def _meshes(request: Request) -> Iterator[tuple[str, Request]]:
    try:
        best = search(request, batches=[request.batch], remats=[request.remat])[0].request
    except ValueError:  # none fits
        return
    yield f"--mesh {best.mesh}", best


def _chips(request: Request) -> Iterator[tuple[str, Request]]:
    axis = "fsdp" if request.training else "tensor"
    place = grown(request.topology)
    while place is not None and place.devices <= 64 * request.topology.devices:
        times = place.devices // request.topology.devices
        spec = MeshSpec(**{**request.mesh.sizes, axis: request.mesh.sizes[axis] * times})
        larger = dataclasses.replace(request, topology=place, mesh=spec)
        text = f"--topology {place.name} --mesh {spec}"
        yield text, larger
        if request.training:
            yield f"{text} --batch {request.batch * times}", dataclasses.replace(larger, batch=request.batch * times)
        place = grown(place)
