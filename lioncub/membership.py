"""The set of ranks that vote together, and everything that depends on it: groups, costs, voters, sizes of buckets."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from os import PathLike

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lioncub.arguments import check_flag
from lioncub.buckets import Bucket, bucket_bytes_of
from lioncub.collectives import ALGORITHMS, Costs, ProcessGroups, Profile, Topology, Voter, find_topology
from lioncub.collectives.agreement import agreement, digest
from lioncub.collectives.cost import candidates, default_costs
from lioncub.collectives.groups import grid_of, new_group, subgroups
from lioncub.collectives.probe import measure_costs
from lioncub.collectives.simulated import SimulatedProcessGroup
from lioncub.collectives.transport import Group, backend_of, gather_objects, is_listed, rank_of, world_size_of
from lioncub.config import Comm
from lioncub.momentum_sync import MomentumSync
from lioncub.params import Meshes
from lioncub.tuning import LEAST_BYTES, Plan, Tuner, plans_of

# one rank sends nothing, so all that may share a bucket does: on a GPU a step is two launches and one wait
_ALONE_BYTES = 2**62
# of what a compiler traces there are no hierarchical collectives
CAPTURABLE = ("all_gather", "reduce_scatter", "all_reduce")


class Membership:
    """The ranks of one process group and how their votes are carried.

    Construction checks the arguments and communicates nothing; `connect` is a collective. Another set of ranks has
    another object.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        comm: Comm,
        overlap: bool,
        impl: str,
        meshes: Meshes,
    ) -> None:
        algorithm, mesh, profile = comm.algorithm, comm.mesh, comm.profile
        if algorithm not in ("auto", *ALGORITHMS):
            raise ValueError(f"algorithm: expected one of {('auto', *ALGORITHMS)}, got {algorithm!r}")
        check_flag("overlap", overlap)
        is_group = isinstance(group, dist.ProcessGroup) or group == dist.GroupMember.NON_GROUP_MEMBER
        if group is not None and not is_group:
            raise TypeError(f"process_group: expected a ProcessGroup or None, got {type(group).__name__} {group!r}")
        if mesh is not None and not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh: expected a DeviceMesh, got {type(mesh).__name__}")
        if isinstance(group, SimulatedProcessGroup) and (overlap or mesh is not None):
            expected, got = ("overlap: expected False", overlap) if overlap else ("mesh: expected None", mesh)
            raise ValueError(f"{expected} with simulated workers, which have one thread each, got {got}")
        if profile is not None and not isinstance(profile, str | PathLike | Profile):
            raise TypeError(f"profile: expected a path or a Profile, got {type(profile).__name__} {profile!r}")
        self.group, self.algorithm, self.mesh, self.overlap, self._impl = group, algorithm, mesh, overlap, impl
        self.profile = profile if profile is None or isinstance(profile, Profile) else Profile.load(profile)
        self._given_bytes = None if comm.bucket_mb is None else bucket_bytes_of(comm.bucket_mb)
        # chosen by the model when the first groups are known, and corrected by the first steps
        self.plan: Plan | None = None
        self.tuner = Tuner([])
        self.workers = world_size_of(group) if group or dist.is_initialized() else 1
        self.rank = rank_of(group) if self.workers > 1 else 0
        # process groups that are ours to destroy
        self.own_groups: list[dist.ProcessGroup] = []
        self.groups: ProcessGroups
        self.costs: Costs
        self.meshes = meshes
        # where parameters are sharded: the ranks that decide together, and for each the first one of its vote
        self._deciding: dist.ProcessGroup | None = None
        self.layouts: list[int] | None = None
        # a group may be collected on one rank before others: only backends whose ends are independent allow that
        self.ends_alone = False

    @property
    def own_state(self) -> str:
        """Whose momentum this rank has: the text in a checkpoint."""
        return f"rank {self.rank} of {self.workers}"

    @property
    def is_alone(self) -> bool:
        """Whether no other rank takes part in a decision."""
        return self.workers == 1 and self._deciding is None

    @property
    def deciding(self) -> Group:
        """The group of all ranks that take part in a decision: those of the vote, and all that share a parameter."""
        return self.groups.group if self._deciding is None else self._deciding

    @property
    def voting_ranks(self) -> list[int]:
        """The ranks of the vote, numbered in the world; of simulated ones and of one alone this process."""
        # ranks of other worlds have no number here
        if self.workers == 1 or isinstance(self.group, SimulatedProcessGroup) or not is_listed(self.group):
            return [dist.get_rank() if dist.is_initialized() else 0]
        return dist.get_process_group_ranks(self.group or dist.group.WORLD)

    def agreeing(self, device: torch.device) -> AbstractContextManager[object]:
        """Make an error in the body, where the ranks of each vote communicate, one of all ranks; a collective."""
        return nullcontext() if self._deciding is None else agreement(self._deciding, device)

    def fingerprint(self) -> dict[str, object]:
        """Return what ranks must have in common, by the names that an error gives it."""
        return {
            "algorithm": self.algorithm,
            "mesh": None if self.mesh is None else self.mesh.mesh.tolist(),
            "overlap": self.overlap,
            "profile": None if self.profile is None else f"of {self.profile.date}, hash {digest(self.profile)}",
        }

    def connect(self, device: torch.device) -> None:
        """Find the nodes, create the process groups, load the costs for messages on ``device``. A collective.

        Raises ValueError where a profile was measured on another group, or "hierarchical" is asked for on nodes that
        do not allow it.
        """
        self._connect_deciders(device)
        if self.workers == 1:
            return
        # votes that are sent during backward must not come between a user's own collectives
        group = subgroups(self.group, [range(self.workers)], device)[0] if self.overlap else self.group
        self._own(group)
        if self.mesh is not None:
            self.groups = ProcessGroups.of_mesh(self.mesh, self.group, device)
            self._own(self.groups.intra, self.groups.inter)
            if self.overlap:
                self.groups = ProcessGroups.build(group, self.groups.topology, device)
        elif self.algorithm in ("auto", "hierarchical") or self.profile is not None:
            self.groups = ProcessGroups.build(group, find_topology(self.group, device), device)
        elif self.algorithm == "reduce_scatter":
            # whether its messages are eager depends on the nodes; groups of theirs are not needed
            self.groups = ProcessGroups(group, find_topology(self.group, device))
        else:
            self.groups = ProcessGroups.flat(group)
        self._own(self.groups.intra, self.groups.inter)
        backend = backend_of(group, device.type)
        self.ends_alone = backend == "gloo"
        if self.profile is not None:
            self.costs = self.profile.costs(self.groups.topology, backend)
        elif isinstance(self.group, SimulatedProcessGroup) or not self._is_open:
            self.costs = default_costs(self.groups.topology, backend)
        else:
            self.costs = measure_costs(self.groups, device, self._impl)

    def leave(self) -> None:
        """Let go of all groups, as if alone, so that connections end and ranks that wait for this one notice."""
        self.workers, self.rank, self.group, self._deciding, self.layouts = 1, 0, None, None, None
        self.groups = ProcessGroups(None, Topology.flat(1))
        self.own_groups.clear()

    def _connect_deciders(self, device: torch.device) -> None:
        """Create the group of all ranks that share a parameter, through a vote or a mesh. A collective of them."""
        if not self.meshes.groups:
            return
        mine, voting = sorted(self.meshes.ranks), self.voting_ranks
        if self.workers > 1 and self.group is not None and not is_listed(self.group):
            self._deciding, self.layouts = grid_of(self.group, self.meshes.groups, mine, device)
            self.own_groups.append(self._deciding)
            return
        meshes = gather_objects(mine, self.group, device) if self.workers > 1 else [mine]
        ranks = sorted({rank for mesh in meshes for rank in mesh})
        self.ends_alone = backend_of(self.meshes.groups[0], device.type) == "gloo"
        self._deciding = new_group(ranks, self.group if self.workers > 1 else self.meshes.groups[0], device)
        stated = gather_objects((ranks, voting[0]), self._deciding, device)
        if any(theirs != ranks for theirs, _ in stated):
            raise ValueError(f"process_group: expected votes and meshes that make a grid of ranks, got {stated}")
        self.layouts = [ranks.index(first) for _, first in stated]
        if len(ranks) == dist.get_world_size():
            self.own_groups.append(self._deciding)

    @property
    def _is_open(self) -> bool:
        """Whether anything is left to choose."""
        return self.algorithm == "auto" or (self.overlap and self._given_bytes is None)

    def choose_bucket_bytes(self, group_bytes: Sequence[int]) -> int:
        """Return the bytes of buckets, for packed bytes of each set of parameters that may share them."""
        if self.plan is None:
            plans = [Plan(self.algorithm, self._given_bytes or _ALONE_BYTES)]
            if self.workers > 1:
                plans = plans_of(
                    group_bytes,
                    self.costs,
                    algorithm=self.algorithm,
                    bucket_bytes=self._given_bytes,
                    overlap=self.overlap,
                )
            self.plan = plans[0]
            # a profile was measured with more care than the first steps allow
            is_tuned = self._is_open and self.profile is None and not isinstance(self.group, SimulatedProcessGroup)
            self.tuner = Tuner(plans if is_tuned and self.workers > 1 else plans[:1])
        return self.plan.bucket_bytes

    def voters(self, buckets: Sequence[Bucket], *, functional: bool) -> list[Voter]:
        """Return what carries each bucket, in their order."""
        return [
            Voter(
                bucket.n_bytes,
                groups=self.groups,
                device=bucket.device,
                algorithm=self._algorithm_of(bucket, functional),
                costs=self.costs,
                form=bucket.compression.form,
                impl=self._impl,
                tag=tag,
                eager=True if self.overlap else None,
                functional=functional,
            )
            for tag, bucket in enumerate(buckets)
        ]

    def _algorithm_of(self, bucket: Bucket, functional: bool) -> str:
        form = bucket.compression.form
        if self.algorithm != "auto":
            return self.algorithm
        possible = [name for name in candidates(self.costs.topology, form) if not functional or name in CAPTURABLE]
        if self.plan is not None and self.plan.algorithm in possible and bucket.n_bytes * form.bits >= LEAST_BYTES:
            return self.plan.algorithm
        return min(possible, key=lambda name: self.costs.seconds(name, bucket.n_bytes, form))

    def _own(self, *groups: dist.ProcessGroup | None) -> None:
        """Keep in mind the groups that were created here."""
        theirs = [self.group, dist.group.WORLD, *([] if self.mesh is None else self.mesh.get_all_groups())]
        # torch names a group of a part of all processes by the number of groups, so that a later one could get the name
        # of one that is destroyed, and with it the addresses that its ranks left in the store
        if isinstance(self.group, SimulatedProcessGroup):
            return
        if is_listed(self.group) and self.workers != dist.get_world_size():
            return
        for group in groups:
            if group is not None and not any(group is known for known in [*theirs, *self.own_groups]):
                self.own_groups.append(group)


def check_capturable(
    members: Membership, devices: Sequence[str], policy: MomentumSync | None, drift_every: int | None
) -> None:
    """Raise ValueError, naming the argument, for what a capturable step cannot do."""
    moves_on = policy is not None and (policy.every != 1 or policy.is_auto)
    refused: list[tuple[bool, str, object]] = [
        (members.overlap, "overlap: expected False", members.overlap),
        (moves_on, "momentum_sync: expected None or MomentumSync(every=1)", policy),
        (drift_every is not None, "drift_every: expected None", drift_every),
        (isinstance(members.group, SimulatedProcessGroup), "process_group: expected real workers", "simulated ones"),
        (len(set(devices)) > 1, "params: expected all on one device", devices),
        (bool(members.meshes.groups), "params: expected whole tensors", "shards (DTensor)"),
        (
            members.algorithm not in ("auto", *CAPTURABLE),
            f"algorithm: expected one of {('auto', *CAPTURABLE)}",
            members.algorithm,
        ),
    ]
    for is_refused, expected, got in refused:
        if is_refused:
            raise ValueError(f"{expected} with capturable=True, got {got!r}")
