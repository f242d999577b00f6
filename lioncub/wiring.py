"""How an optimizer's buckets travel: the process groups, what a vote costs on them, which way each bucket takes."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from lioncub.arguments import check_flag
from lioncub.buckets import Bucket
from lioncub.collectives import ALGORITHMS, Costs, Profile, Routes, Voter, find_topology
from lioncub.collectives.cost import best_bucket_bytes, default_costs
from lioncub.collectives.handshake import digest
from lioncub.collectives.routes import subgroups
from lioncub.collectives.transport import backend_of, rank_of, world_size_of
from lioncub.collectives.virtual import VirtualGroup

PathOrProfile = str | PathLike[str] | Profile


def destroy_groups(groups: list[dist.ProcessGroup]) -> None:
    """Destroy process groups, where destroy_process_group() has not done it before, and empty the list."""
    while groups:
        group = groups.pop()
        if group in distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)


class Wiring:
    """The arguments of `LionCub` that say how votes travel, and what follows from them once the group is known.

    Construction checks the arguments and communicates nothing. ``connect`` is a collective call.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        algorithm: str,
        mesh: DeviceMesh | None,
        profile: PathOrProfile | None,
        overlap: bool,
        impl: str,
    ) -> None:
        if algorithm not in ("auto", *ALGORITHMS):
            raise ValueError(f"algorithm: expected one of {('auto', *ALGORITHMS)}, got {algorithm!r}")
        check_flag("overlap", overlap)
        is_group = isinstance(group, dist.ProcessGroup) or group == dist.GroupMember.NON_GROUP_MEMBER
        if group is not None and not is_group:
            raise TypeError(f"process_group: expected a ProcessGroup or None, got {type(group).__name__} {group!r}")
        if mesh is not None and not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh: expected a DeviceMesh, got {type(mesh).__name__}")
        if isinstance(group, VirtualGroup) and (overlap or mesh is not None):
            expected, got = ("overlap: expected False", overlap) if overlap else ("mesh: expected None", mesh)
            raise ValueError(f"{expected} with simulated workers, which have one thread each, got {got}")
        self.group, self.algorithm, self.mesh = group, algorithm, mesh
        self.overlap, self._impl = overlap, impl
        if profile is not None and not isinstance(profile, str | PathLike | Profile):
            raise TypeError(f"profile: expected a path or a Profile, got {type(profile).__name__} {profile!r}")
        self.profile = profile if profile is None or isinstance(profile, Profile) else Profile.load(profile)
        self.workers = world_size_of(group) if group or dist.is_initialized() else 1
        # process groups that are ours to destroy
        self.own_groups: list[dist.ProcessGroup] = []

    @property
    def rank(self) -> int:
        """This worker's rank in the group."""
        return rank_of(self.group) if self.workers > 1 else 0

    def facts(self) -> dict[str, object]:
        """What workers must have in common, by the names that an error gives it."""
        return {
            "algorithm": self.algorithm,
            "mesh": None if self.mesh is None else self.mesh.mesh.tolist(),
            "overlap": self.overlap,
            "profile": None if self.profile is None else f"of {self.profile.date}, hash {digest(self.profile)}",
        }

    def connect(self, device: torch.device) -> None:
        """Find the nodes, make the process groups, load the costs for messages on ``device``. A collective call.

        Raises ValueError where a profile was measured on another group, or "hierarchical" is asked for on nodes that
        do not allow it.
        """
        # votes that travel during backward must not come between a user's own collectives
        group = subgroups(self.group, [range(self.workers)], device)[0] if self.overlap else self.group
        self._own(group)
        if self.mesh is not None:
            self.routes = Routes.of_mesh(self.mesh, self.group, device)
            self._own(self.routes.intra, self.routes.inter)
            if self.overlap:
                self.routes = Routes.build(group, self.routes.topology, device)
        elif self.algorithm in ("auto", "hierarchical") or self.profile is not None:
            self.routes = Routes.build(group, find_topology(self.group, device), device)
        elif self.algorithm == "reduce_scatter":
            # which way its messages take depends on the nodes; groups of theirs are not needed
            self.routes = Routes(group, find_topology(self.group, device))
        else:
            self.routes = Routes.flat(group)
        self._own(self.routes.intra, self.routes.inter)
        backend = backend_of(group, device.type)
        # a group may be collected on one worker before others: only backends whose ends are independent allow that
        self.ends_alone = backend == "gloo"
        self.costs: Costs
        if self.profile is not None:
            self.costs = self.profile.costs(self.routes.topology, backend)
        else:
            self.costs = default_costs(self.routes.topology, backend)

    def _own(self, *groups: dist.ProcessGroup | None) -> None:
        """Keep in mind the groups that were made here."""
        theirs = [self.group, dist.group.WORLD, *([] if self.mesh is None else self.mesh.get_all_groups())]
        # torch names a group of a part of all processes by the number of groups, so that a later one could get the name
        # of one that is destroyed, and with it the addresses that its workers left in the store
        if isinstance(self.group, VirtualGroup) or self.workers != dist.get_world_size():
            return
        for group in groups:
            if group is not None and not any(group is known for known in [*theirs, *self.own_groups]):
                self.own_groups.append(group)

    def bucket_bytes(self, group_bytes: Sequence[int]) -> int:
        """Bytes of a bucket chosen by the model, for packed bytes of each set of parameters that may share buckets."""
        return best_bucket_bytes(group_bytes, self.algorithm, self.costs, overlap=self.overlap)

    def voters(self, buckets: Sequence[Bucket], first: int = 0) -> list[Voter]:
        """What carries each bucket, in their order, from number ``first`` on."""
        return [self._voter(bucket, tag) for tag, bucket in enumerate(buckets, start=first)]

    def _voter(self, bucket: Bucket, tag: int) -> Voter:
        return Voter(
            bucket.n_bytes,
            n_tensors=len(bucket.slots),
            routes=self.routes,
            algorithm=self.algorithm,
            costs=self.costs,
            impl=self._impl,
            tag=tag,
            at_once=True if self.overlap else None,
            codes=bucket.compression.codes,
        )
