"""Evidence that two names are one site.

Witnesses, strongest first: the exact key; the flow's own record of what it fused; the float model; what a forward
shows; wrapper segments, stripped only where no two names fall together; the user's `rename`; uniqueness of shape
within one parent; naming convention, where it is a complete bijection. Never position. Two answers left is an
ambiguity, which is reported with both.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from qat_compat.errors import PlanError, Problem, ProblemKind
from qat_compat.schema import UNKNOWN, Fused, Schema, Spec, Stage
from qat_compat.state import join_path, split_path

__all__ = ["Evidence", "Match", "Rename", "canonical", "match", "resolve_alone"]

Rename = Sequence[tuple[str, str]]

# path segments that a wrapper puts around a module: DDP and DataParallel, torch.compile, FSDP, activation
# checkpointing, d2go, Lightning modules and Hugging Face heads
WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_prepared", "model"}
)
# words that a naming convention puts in the place of each other: `conv1`/`bn1`, `conv_a`/`norm_a`, `expand`/`expand_bn`
_CONVENTION = re.compile(
    r"_?(?:convolution|conv|linear|lin|dense|fc|batch_?norm(?:alization)?|normalization|norm|bn)(?![a-z])_?"
)


@dataclass(frozen=True)
class Evidence:
    """Host module path (float words) -> batch normalizations that the witness saw on its output."""

    by_host: Mapping[str, tuple[str, ...]]
    witness: str

    @cached_property
    def _by_form(self) -> dict[str, tuple[str, ...]]:
        return {canonical(join_path(host, "_")): paths for host, paths in self.by_host.items() if paths}

    def of(self, host: str) -> tuple[str, ...]:
        """What the witness saw after `host`, under any wrappers."""
        return self._by_form.get(canonical(join_path(host, "_")), ())


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
        prefix: Leading path that every source name has and no target name; `target_prefix` the other way round.
    """

    pairs: dict[str, tuple[str, str]] = field(default_factory=dict)
    norms: dict[str, tuple[str, str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    contested: set[str] = field(default_factory=set)
    options: dict[str, dict[str, Mapping[str, str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    prefix: str = ""
    target_prefix: str = ""


def canonical(name: str) -> str:
    """A name without wrapper segments.

    Example:
        >>> canonical("module._orig_mod.model.conv.weight"), canonical("my_module.w")
        ('conv.weight', 'my_module.w')
    """
    parts = name.split(".")
    kept = [part for part in parts[:-1] if part not in WRAPPERS]
    return ".".join([*kept, parts[-1]])


def renamed(name: str, rename: Rename) -> str:
    """Apply ordered (pattern, replacement) pairs to a source key."""
    for pattern, replacement in rename:
        try:
            name = re.sub(pattern, replacement, name)
        except re.error as error:
            problem = Problem(ProblemKind.INVALID, pattern, f"rename pattern or replacement is not valid: {error}")
            raise PlanError([problem]) from error
    return name


def match(source: Schema, target: Schema, *, rename: Rename = (), evidence: Sequence[Evidence] = ()) -> Match:
    """Pair the float entries of two schemas.

    Example:
        >>> import torch
        >>> from qat_compat.schema import Entry, Role
        >>> def schema(*keys):
        ...     return Schema({key: Entry(key, Role.PARAMETER, (2,), torch.float32) for key in keys})
        >>> match(schema("module.fc.weight"), schema("fc.weight")).pairs
        {'fc.weight': ('module.fc.weight', 'wrapper prefix')}

    Args:
        source: Schema of the file.
        target: Schema of the model or layout.
        rename: Ordered (regex, replacement) pairs, applied to source keys.
        evidence: What a float model or a forward shows of fused normalizations, strongest first.
    """
    found = _match(source, target, rename, evidence)
    if not found.pairs and not found.problems:
        left, right = _one_attribute(source, target, rename)
        if left or right:
            found = _match(_without_prefix(source, left), _without_prefix(target, right), rename, evidence)
            found.pairs = {key: (origin, "common prefix") for key, (origin, _) in found.pairs.items()}
            found.prefix, found.target_prefix = left, right
    return found


def _match(source: Schema, target: Schema, rename: Rename, evidence: Sequence[Evidence]) -> Match:
    matcher = _Matcher(source, target, rename)
    matcher.by_key()
    matcher.by_form(str, "same site")
    matcher.by_form(canonical, "wrapper prefix")
    matcher.by_unprepared_fusion()
    matcher.by_fusion(evidence)
    matcher.by_common_prefix()
    return matcher.found


def _one_attribute(source: Schema, target: Schema, rename: Rename) -> tuple[str, str]:
    """The leading path that one side has before every name and the other has not: the training module's attribute."""
    left = _common_path([renamed(source[key].site, rename) for key in source.float_keys()])
    right = _common_path([target[key].site for key in target.float_keys()])
    if left != right and left.endswith(right):
        return left.removesuffix(right), ""
    if left != right and right.endswith(left):
        return "", right.removesuffix(left)
    return "", ""


def _without_prefix(schema: Schema, prefix: str) -> Schema:
    """The same keys, with a leading path taken off the sites of float entries."""
    if not prefix:
        return schema
    entries = {key: replace(entry, site=entry.site.removeprefix(prefix)) for key, entry in schema.items()}
    fused = tuple(replace(one, host=one.host.removeprefix(prefix)) for one in schema.fused)
    return replace(schema, entries=entries, fused=fused, _by_quantizer={})


class _Matcher:
    """The two sides while they are being paired: `free` source keys, `wanted` target keys, both in order."""

    def __init__(self, source: Schema, target: Schema, rename: Rename) -> None:
        self.source = source
        self.target = target
        self.found = Match()
        self.names = self._renamed_keys(rename)
        self.free = dict.fromkeys(self.names)
        self.wanted = dict.fromkeys(target.float_keys())

    def _renamed_keys(self, rename: Rename) -> dict[str, str]:
        """Source key -> the name it goes by after `rename`; two keys that fall together are a problem."""
        names: dict[str, str] = {}
        taken: dict[str, str] = {}
        for key in self.source.float_keys():
            name = renamed(key, rename)
            if name in taken:
                detail = f"{taken[name]} and {key} are both renamed to {name}"
                self._ambiguous(name, detail, "make the rename patterns stricter", [key])
            taken[name] = key
            names[key] = name
        return names

    def _ambiguous(self, key: str, detail: str, remedy: str, origins: Iterable[str]) -> None:
        self.found.problems.append(Problem(ProblemKind.AMBIGUOUS, key, detail, remedy))
        self.found.contested.update(origins)
        self.found.contested.add(key)

    def _take(self, key: str, origin: str, witness: str) -> None:
        self.found.pairs[key] = (origin, witness)
        del self.free[origin]
        del self.wanted[key]

    def _source_site(self, key: str) -> str:
        """The site of a source key; a key that the user renamed is its own site."""
        name = self.names[key]
        return self.source[key].site if name == key else name

    def by_key(self) -> None:
        """A name that matches exactly is never renamed."""
        by_name = {name: key for key, name in self.names.items()}
        for key in list(self.wanted):
            origin = by_name.get(key)
            if origin is not None and origin in self.free:
                self._take(key, origin, "exact key" if origin == key else "rename=")

    def by_form(self, form_of: Callable[[str], str], witness: str) -> None:
        """Pair what is left by a normal form of the site, where exactly one key on each side has it."""
        left: dict[str, list[str]] = {}
        for key in self.free:
            left.setdefault(form_of(self._source_site(key)), []).append(key)
        right: dict[str, list[str]] = {}
        for key in self.wanted:
            right.setdefault(form_of(self.target[key].site), []).append(key)
        for form, keys in right.items():
            origins = left.get(form, [])
            if len(origins) == 1 and len(keys) == 1:
                self._take(keys[0], origins[0], witness)
                continue
            for key in keys if origins else ():
                detail = f"could be {_either(origins)}"
                if len(origins) == 1:
                    detail = f"{_either(keys)} could all be {origins[0]}"
                self._ambiguous(key, detail, "name the right one with rename=, or drop= the other", origins)

    def by_unprepared_fusion(self) -> None:
        """A fused module that was not prepared keeps its parts as children: its first child is the host itself."""
        wanted = {self.target[key].site: key for key in self.wanted}
        for key in list(self.free):
            parent, leaf = split_path(self._source_site(key))
            host, child = split_path(parent)
            key_there = wanted.get(join_path(host, leaf))
            if child == "0" and key_there is not None and self.source.stage is Stage.PREPARED:
                self._take(key_there, key, "first part of a fused module")

    def by_fusion(self, evidence: Sequence[Evidence]) -> None:
        """Pair normalizations that fusion renamed on one side with modules of the other side that nothing has taken."""
        self._by_fusion(self.target, self.wanted, self.source, self.free, self._source_site, evidence)
        self._by_fusion(self.source, self.free, self.target, self.wanted, lambda key: self.target[key].site, evidence)

    def _by_fusion(
        self,
        schema: Schema,
        mine: Mapping[str, None],
        other: Schema,
        others: Mapping[str, None],
        site_of: Callable[[str], str],
        evidence: Sequence[Evidence],
    ) -> None:
        groups = [one for one in schema.fused if any(join_path(one.prefix, name) in mine for name in one.tensors)]
        if not groups:
            return
        modules: dict[str, dict[str, str]] = {}
        for key in others:
            parent, leaf = split_path(site_of(key))
            modules.setdefault(parent, {})[leaf] = key
        pool = {
            path: {leaf: other[key].spec for leaf, key in tensors.items()}
            for path, tensors in modules.items()
            if "weight" in tensors or "running_mean" in tensors
        }
        for prefix, (path, witness) in _choose(groups, pool, modules, evidence, self.found).items():
            self.found.norms[prefix] = (path, witness)
            for leaf, key in modules[path].items():
                own = join_path(prefix, leaf)
                if own not in mine:
                    continue
                if schema is self.target:
                    self._take(own, key, witness)
                else:
                    self._take(key, own, witness)

    def by_common_prefix(self) -> None:
        """Pair what is left if taking one leading path off each side makes the two sides equal, name by name."""
        if not self.free or len(self.free) != len(self.wanted):
            return
        left = {self._source_site(key): key for key in self.free}
        right = {self.target[key].site: key for key in self.wanted}
        left_prefix, right_prefix = _common_path(left), _common_path(right)
        if left_prefix == right_prefix:
            return
        cut = {name[len(left_prefix) :]: key for name, key in left.items()}
        pairs = {key: cut.get(name[len(right_prefix) :]) for name, key in right.items()}
        if any(o is None or self.source[o].shape != self.target[key].shape for key, o in pairs.items()):
            return
        for key, origin in pairs.items():
            assert origin is not None
            self._take(key, origin, "common prefix")


def _either(names: Iterable[str]) -> str:
    return " or ".join(names)


# --- fused normalizations ---------------------------------------------------------------------------------------------


def _choose(
    groups: Sequence[Fused],
    pool: Mapping[str, Mapping[str, Spec]],
    keys_of: Mapping[str, Mapping[str, str]],
    evidence: Sequence[Evidence],
    found: Match,
) -> dict[str, tuple[str, str]]:
    """Fused prefix -> (module path of the other side, witness)."""
    by_form: dict[str, list[str]] = {}
    for path in pool:
        by_form.setdefault(canonical(join_path(path, "_")), []).append(path)
    chosen: dict[str, tuple[str, str]] = {}
    options: dict[str, tuple[list[str], str]] = {}
    taken: set[str] = set()
    for group in groups:
        spoken, witness = _spoken(group, evidence, found)
        paths = list(dict.fromkeys(p for name in spoken for p in by_form.get(canonical(join_path(name, "_")), [])))
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
        if len(left) > 1:
            found.options[group.prefix] = {path: keys_of[path] for path in left}
        if len(left) > 1 and group.prefix not in chosen:
            detail = f"the normalization fused into {group.host} could be {_either(left[:6])}"
            remedy = (
                "pass float_model= (like= the float model, for to_float), whose trace tells which,"
                f" or rename= one of them to {group.prefix}"
            )
            found.problems.append(Problem(ProblemKind.AMBIGUOUS, group.prefix, detail, remedy))
            found.contested.update(join_path(group.prefix, leaf) for leaf in group.tensors)
            found.contested.update(key for path in left for key in keys_of[path].values())
    return chosen


def _spoken(group: Fused, evidence: Sequence[Evidence], found: Match) -> tuple[tuple[str, ...], str]:
    """What the strongest witness that speaks says of a group."""
    voices = [(group.candidates, group.witness)] if group.candidates else []
    voices += [(one.of(group.host), one.witness) for one in evidence if one.of(group.host)]
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
            parent = canonical(join_path(split_path(path)[0], "_"))
            by_parent.setdefault((parent, sizes.pop()), []).append(path)
    classes: dict[tuple[tuple[str, ...], str], list[Fused]] = {}
    for group in groups:
        if group.prefix in options:
            listed, witness = options[group.prefix]
        else:
            parent = canonical(join_path(split_path(group.host)[0], "_"))
            listed = [p for size in (group.channels, *UNKNOWN) for p in by_parent.get((parent, size), [])]
            witness = "only shape that fits in its parent"
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


def _skeleton(path: str) -> str:
    return ".".join(_CONVENTION.sub("", part) for part in canonical(join_path(path.lower(), "_")).split("."))


def _conventional(host: str) -> set[str]:
    """Skeletons of the names that a normalization after `host` has by convention."""
    forms = {_skeleton(host)}
    parent, leaf = split_path(host)
    if leaf.isdigit():
        forms = {_skeleton(join_path(parent, str(int(leaf) + 1)))}
    return forms


def _by_convention(
    groups: Sequence[Fused],
    pool: Mapping[str, Mapping[str, Spec]],
    chosen: dict[str, tuple[str, str]],
    notes: list[str],
) -> None:
    """Settle groups by name (`conv1`/`bn1`, `0`/`1` in a Sequential), if each of them finds exactly one partner."""
    by_skeleton: dict[str, list[str]] = {}
    for path in pool:
        by_skeleton.setdefault(_skeleton(path), []).append(path)
    settled: dict[str, str] = {}
    for group in groups:
        partners = {p for form in _conventional(group.host) for p in by_skeleton.get(form, [])}
        partners = {p for p in partners if not pool[p] or _fits(group, pool[p])}
        if len(partners) != 1:
            return
        settled[group.prefix] = partners.pop()
    if settled and len(set(settled.values())) == len(settled):
        chosen.update({prefix: (path, "naming convention") for prefix, path in settled.items()})
        prefix, path = next(iter(settled.items()))
        notes.append(
            f"{len(settled)} fused normalization(s) are named by convention alone ({prefix} is {path}, ...);"
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
    for group in schema.fused:
        if not group.certain:
            remedy = "pass like= (the float model, its state_dict, a path or its keys)"
            detail = f"{group.host} is either a fused pair that was not prepared or a Sequential of the float model"
            found.problems.append(Problem(ProblemKind.AMBIGUOUS, group.prefix, detail, remedy))
            continue
        spoken, witness = _spoken(group, evidence, found)
        if len(spoken) > 1 and all(claims[path] == 1 for path in spoken):
            # an identity of the model's own stands beside the emptied place; no other norm can be meant by either
            named = [path for path in spoken if _skeleton(path) in _conventional(group.host)]
            spoken = tuple(named) if len(named) == 1 else spoken
        if len(spoken) == 1:
            found.norms[group.prefix] = (spoken[0], witness)
        elif spoken:
            remedy = "pass like= (the float model, its state_dict, a path or its keys)"
            detail = f"the normalization fused into {group.host} could be {_either(spoken)}"
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


def _common_path(names: Iterable[str]) -> str:
    """The longest leading path, with its dot, that all names share."""
    listed = [name.split(".")[:-1] for name in names]
    if not listed:
        return ""
    shortest, longest = min(listed), max(listed)
    length = 0
    while length < min(len(shortest), len(longest)) and shortest[length] == longest[length]:
        length += 1
    return ".".join(shortest[:length]) + "." if length else ""
