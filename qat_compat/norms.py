"""Which batch normalization of one side is which fused one of the other.

Fusion takes the name of a normalization out of its keys. What is known of it comes from witnesses; where they leave
several answers, shapes may leave one, and then the naming convention, if it settles all that are left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from qat_compat.errors import Problem, ProblemKind
from qat_compat.names import Rename, canonical_path, conventional, either, skeletons
from qat_compat.schema import UNKNOWN, Fused, Schema, Spec
from qat_compat.state import join_path, split_path
from qat_compat.text import counted

__all__ = ["Evidence", "Match", "choose", "resolve_alone"]


@dataclass(frozen=True)
class Evidence:
    """Host module path (float words) -> batch normalizations that the witness saw on its output."""

    by_host: Mapping[str, tuple[str, ...]]
    witness: str

    @cached_property
    def _by_form(self) -> dict[str, set[tuple[str, ...]]]:
        found: dict[str, set[tuple[str, ...]]] = {}
        for host, paths in self.by_host.items():
            if paths:
                found.setdefault(canonical_path(host), set()).add(paths)
        return found

    def of(self, host: str, *, alone: bool = True) -> tuple[str, ...]:
        """What the witness saw after `host`; if that is the only module of its name without wrapper segments, then
        under any wrappers."""
        if paths := self.by_host.get(host):
            return paths
        seen = self._by_form.get(canonical_path(host), set()) if alone else set()
        return next(iter(seen)) if len(seen) == 1 else ()

    def without(self, cut: str, host: str, *, alone: bool = True) -> tuple[str, ...]:
        """The same for a host that has lost a leading path, which the witness may know."""
        if cut and all(name.startswith(cut) for name in self.by_host):
            return tuple(path.removeprefix(cut) for path in self.of(cut + host, alone=alone))
        return self.of(host, alone=alone)


_BY_SHAPE = "only shape that fits in its parent"
_BY_CONVENTION = "naming convention"


@dataclass
class Match:
    """Which source key is which target key, and why.

    Args:
        pairs: target key -> (source key, witness).
        norms: prefix of a fused normalization -> (its float module path, witness).
        problems: Ambiguities and collisions.
        contested: Keys of either side that a problem names already.
        options: Prefix of a fused normalization whose name is open, or rests on convention alone -> module path of the
            other side -> leaf -> key there.
        notes: Where witnesses disagreed.
        prefix: Leading path of every source name that is no part of the target's names; `target_prefix` the other way
            round.
        rename: What the user calls the source's names, before the prefix is taken off.
    """

    pairs: dict[str, tuple[str, str]] = field(default_factory=dict)
    norms: dict[str, tuple[str, str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    contested: set[str] = field(default_factory=set)
    options: dict[str, dict[str, Mapping[str, str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    prefix: str = ""
    target_prefix: str = ""
    rename: Rename = ()

    @property
    def is_in_doubt(self) -> bool:
        """Whether a forward of the model could tell a fused normalization better than names and shapes do."""
        return bool(self.options) or any(witness in (_BY_SHAPE, _BY_CONVENTION) for _, witness in self.norms.values())


def choose(
    groups: Sequence[Fused],
    pool: Mapping[str, Mapping[str, Spec]],
    keys_of: Mapping[str, Mapping[str, str]],
    evidence: Sequence[Evidence],
    found: Match,
    cut: str = "",
    modules: Iterable[str] = (),
) -> dict[str, tuple[str, str]]:
    """Fused prefix -> (module path of the other side, witness).

    Args:
        groups: Fused normalizations whose partner is wanted.
        pool: Module path of the other side -> leaf -> spec.
        keys_of: Module path of the other side -> leaf -> key.
        evidence: What witnesses saw, strongest first.
        found: Takes what stays open.
        cut: Leading path that the other side does not have.
        modules: Every module on the side of the groups.
    """
    shared = _shared_forms([*modules, *(group.host for group in groups)])
    by_form: dict[str, list[str]] = {}
    for path in pool:
        by_form.setdefault(canonical_path(path), []).append(path)
    chosen: dict[str, tuple[str, str]] = {}
    options: dict[str, tuple[list[str], str]] = {}
    taken: set[str] = set()
    heard = [(group, *_spoken(group, evidence, found, shared, cut)) for group in groups]
    exact = {name for _, spoken, _ in heard for name in spoken if name in pool}
    for group, spoken, witness in heard:
        paths = list(dict.fromkeys(path for name in spoken for path in _paths_of(name, by_form, exact)))
        if len(spoken) == 1 and len(paths) == 1 and paths[0] not in taken:
            chosen[group.prefix] = (paths[0], witness)  # a shape that differs is reported where it is copied
            taken.add(paths[0])
        elif len(spoken) == 1 and not paths:
            found.norms[group.prefix] = (spoken[0], witness)  # known, and missing
            options[group.prefix] = ([], witness)
        elif spoken:
            options[group.prefix] = ([p for p in paths if _fits(group, pool[p])], witness)
    rest = [group for group in groups if group.prefix not in chosen]
    undecided = _by_elimination(rest, options, pool, taken, chosen)
    silent = [group for group in undecided if group.prefix not in options]
    open_pool = {path: tensors for path, tensors in pool.items() if path not in taken}
    _by_convention(silent, open_pool, chosen, found.notes)
    by_size: dict[int, list[str]] = {}
    for path, tensors in open_pool.items():
        for size in {spec.shape[0] for spec in tensors.values() if spec.shape}:
            by_size.setdefault(size, []).append(path)
    for group in undecided:
        listed = options[group.prefix][0] if group.prefix in options else by_size.get(group.channels, [])
        left = [path for path in listed if path in open_pool and _fits(group, open_pool[path])]
        if left:
            found.options[group.prefix] = {path: keys_of[path] for path in left}
        if left and group.prefix not in chosen:
            detail = f"the normalization fused into {group.host} could be {either(left[:6])}"
            remedy = (
                "pass float_model= (like= the float model, for to_float), whose trace tells which,"
                f" or rename= one of them to {group.prefix}"
            )
            found.problems.append(Problem(ProblemKind.AMBIGUOUS, group.prefix, detail, remedy))
            found.contested.update(join_path(group.prefix, leaf) for leaf in group.tensors)
            found.contested.update(key for path in left for key in keys_of[path].values())
    return chosen


def _shared_forms(modules: Iterable[str]) -> set[str]:
    """The names without wrapper segments that several modules have."""
    counts = Counter(map(canonical_path, set(modules)))
    return {form for form, count in counts.items() if count > 1}


def _paths_of(name: str, by_form: Mapping[str, list[str]], exact: Collection[str]) -> list[str]:
    """What a witness means by `name`: what is called so, or else is it under wrappers, and no other one's name."""
    if name in exact:
        return [name]
    return [path for path in by_form.get(canonical_path(name), []) if path not in exact]


def _spoken(
    group: Fused, evidence: Sequence[Evidence], found: Match, shared: Collection[str], cut: str = ""
) -> tuple[tuple[str, ...], str]:
    """What the strongest witness that speaks says of a group."""
    alone = canonical_path(group.host) not in shared
    heard = [(tuple(path.removeprefix(cut) for path in group.candidates), group.witness)]
    heard += [(one.without(cut, group.host, alone=alone), one.witness) for one in evidence]
    voices = [(paths, witness) for paths, witness in heard if paths]
    certain = [voice for voice in voices if len(voice[0]) == 1]
    if len({voice[0][0] for voice in certain}) > 1:
        found.notes.append(
            f"{group.prefix}: "
            + ", but ".join(f"{witness} says {paths[0]}" for paths, witness in certain)
            + f"; taken: {certain[0][0][0]}"
        )
    return certain[0] if certain else voices[0] if voices else ((), "")


def _fits(group: Fused, tensors: Mapping[str, Spec]) -> bool:
    shapes = ((), (group.channels,), UNKNOWN)
    return all(spec.shape in shapes for spec in tensors.values()) and set(tensors) <= set(group.tensors) | {
        "num_batches_tracked"
    }


def _by_elimination(
    groups: list[Fused],
    options: Mapping[str, tuple[list[str], str]],
    pool: Mapping[str, Mapping[str, Spec]],
    taken: set[str],
    chosen: dict[str, tuple[str, str]],
) -> list[Fused]:
    """Settle groups for which only one assignment fits; returns those left.

    Groups of one parent, one size and one set of options are alike to every shape, so the assignment is unique
    exactly where such a class has one group and one module left.
    """
    by_parent: dict[tuple[str, int], list[str]] = {}
    for path, tensors in pool.items():
        sizes = {spec.shape[0] for spec in tensors.values() if spec.shape}
        if path not in taken and len(sizes) == 1:
            parent = canonical_path(split_path(path)[0])
            by_parent.setdefault((parent, sizes.pop()), []).append(path)
    classes: dict[tuple[tuple[str, ...], str], list[Fused]] = {}
    for group in groups:
        if group.prefix in options:
            listed, witness = options[group.prefix]
        else:
            parent = canonical_path(split_path(group.host)[0])
            listed = [p for size in (group.channels, *UNKNOWN) for p in by_parent.get((parent, size), [])]
            witness = _BY_SHAPE
        fitting = tuple(p for p in listed if p not in taken and _fits(group, pool[p]))
        classes.setdefault((fitting, witness), []).append(group)
    left: list[Fused] = []
    claims: dict[str, int] = {}
    for (fitting, _), members in classes.items():
        for path in fitting:
            claims[path] = claims.get(path, 0) + len(members)
    for (fitting, witness), members in classes.items():
        if len(fitting) == 1 and len(members) == 1 and claims[fitting[0]] == 1:
            chosen[members[0].prefix] = (fitting[0], witness)
            taken.add(fitting[0])
        else:
            left += members
    return left


def _by_convention(
    groups: Sequence[Fused],
    pool: Mapping[str, Mapping[str, Spec]],
    chosen: dict[str, tuple[str, str]],
    notes: list[str],
) -> None:
    """Settle groups by name (`conv1`/`bn1`, `0`/`1` in a Sequential), if each of them finds exactly one partner."""
    byskeleton: dict[str, list[str]] = {}
    for path in pool:
        for form in skeletons(path):
            byskeleton.setdefault(form, []).append(path)
    settled: dict[str, str] = {}
    for group in groups:
        partners = {p for form in conventional(group.host) for p in byskeleton.get(form, [])}
        partners = {p for p in partners if not pool[p] or _fits(group, pool[p])}
        beside = {p for p in partners if split_path(p)[0] == split_path(group.host)[0]}
        partners = beside or partners  # a part may have a wrapper's name, and in it what is outside, too
        if len(partners) != 1:
            return
        settled[group.prefix] = partners.pop()
    if settled and len(set(settled.values())) == len(settled):
        chosen.update({prefix: (path, _BY_CONVENTION) for prefix, path in settled.items()})
        prefix, path = next(iter(settled.items()))
        notes.append(
            f"named by convention alone: {counted(len(settled), 'fused normalization')} ({prefix} is {path}, ...);"
            " a float model (float_model=, like=) would make it sure"
        )


def resolve_alone(schema: Schema, evidence: Sequence[Evidence] = ()) -> Match:
    """Find the float names of fused normalizations with no other side to compare to.

    The flow's record and the given evidence decide; where they are silent, the naming convention does, among the
    places that the model or the file's version record says are there.
    """
    found = Match()
    silent: list[Fused] = []
    claims = Counter(path for group in schema.fused for path in group.candidates)
    shared = _shared_forms(group.host for group in schema.fused)
    for group in schema.fused:
        if not group.certain:
            remedy = "pass like= (the float model, its state_dict, a path or its keys)"
            detail = f"{group.host} is either a fused pair that was not prepared or a Sequential of the float model"
            found.problems.append(Problem(ProblemKind.AMBIGUOUS, group.prefix, detail, remedy))
            continue
        spoken, witness = _spoken(group, evidence, found, shared)
        if len(spoken) > 1 and all(claims[path] == 1 for path in spoken):
            # an identity of the model's own stands beside the emptied place; no other norm can be meant by either
            named = [path for path in spoken if not skeletons(path).isdisjoint(conventional(group.host))]
            if len(named) == 1:
                found.notes.append(f"{group.prefix}: {either(spoken)}; taken: {named[0]}, by convention")
                spoken = tuple(named)
        if len(spoken) == 1:
            found.norms[group.prefix] = (spoken[0], witness)
        elif spoken:
            remedy = "pass like= (the float model, its state_dict, a path or its keys)"
            detail = f"the normalization fused into {group.host} could be {either(spoken)}"
            found.problems.append(Problem(ProblemKind.AMBIGUOUS, group.prefix, detail, remedy))
        else:
            silent.append(group)
    taken = {path for path, _ in found.norms.values()}
    _by_convention(silent, {path: {} for path in schema.places if path not in taken}, found.norms, found.notes)
    for group in silent:
        if group.prefix not in found.norms:
            detail = f"fusion took the name of the normalization after {group.host}, and nothing here tells it"
            remedy = "pass like= (the float model, its state_dict, a path or its keys)"
            found.problems.append(Problem(ProblemKind.AMBIGUOUS, group.prefix, detail, remedy))
    return found
