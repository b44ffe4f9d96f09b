"""Evidence that two names are one site.

Witnesses, strongest first: the exact key, or the user's `rename`; the flow's own record of what it fused; the float
model; wrapper segments, stripped only where no two names fall together; uniqueness of shape within one parent; naming
convention, where it is a complete bijection; what a forward shows, which is asked where these leave a doubt and then
goes before convention. Never position. Two answers left is an ambiguity, which is reported with both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from qat_compat.errors import Problem, ProblemKind
from qat_compat.names import WRAPPERS, Rename, canonical, common_path, either, is_named, renamed
from qat_compat.norms import Evidence, Match, choose
from qat_compat.schema import Schema, Stage
from qat_compat.state import join_path, split_path

__all__ = ["match"]


def match(
    source: Schema,
    target: Schema,
    *,
    rename: Rename = (),
    evidence: Sequence[Evidence] = (),
    keep: Sequence[str] = (),
) -> Match:
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
        keep: Globs over target entries that the source need not hold: a new head has no part in a path that all have.
    """
    found = _match(source, target, rename, evidence, _one_wrapper(source, target, rename))
    if not found.pairs and any(cut := _one_attribute(source, target, rename, keep)):
        below = _match(source, target, rename, evidence, cut)
        below.pairs = {key: (origin, "common prefix") for key, (origin, _) in below.pairs.items()}
        if below.pairs or not found.problems:
            return below
    return found


def _match(source: Schema, target: Schema, rename: Rename, evidence: Sequence[Evidence], cut: tuple[str, str]) -> Match:
    matcher = _Matcher(_without_prefix(source, cut[0]), _without_prefix(target, cut[1]), rename, cut)
    matcher.by_key()
    matcher.by_form(str, "same site")
    matcher.by_form(canonical, "wrapper prefix")
    matcher.by_unprepared_fusion()
    matcher.by_fusion(evidence)
    matcher.by_common_prefix()
    return matcher.found


def _one_wrapper(source: Schema, target: Schema, rename: Rename) -> tuple[str, str]:
    """A wrapper's segment that one side has before every name, if more keys are the same without it than with it.

    Parts of a model may have a wrapper's name themselves: `model.stem` of a wrapped file is the `stem` of the model,
    and not its `model.stem`.
    """
    theirs = [renamed(key, rename) for key in source.float_keys()]
    mine = target.float_keys()
    left, right = (common_path(names).partition(".")[0] for names in (theirs, mine))
    here = len(set(theirs).intersection(mine))
    if here < len(mine):
        if left in WRAPPERS and len({name[len(left) + 1 :] for name in theirs}.intersection(mine)) > here:
            return f"{left}.", ""
        if right in WRAPPERS and len({name[len(right) + 1 :] for name in mine}.intersection(theirs)) > here:
            return "", f"{right}."
    return "", ""


def _one_attribute(source: Schema, target: Schema, rename: Rename, keep: Sequence[str]) -> tuple[str, str]:
    """The leading path that one side has before every name and the other has not: the training module's attribute."""
    left = common_path([renamed(source[key].site, rename) for key in source.float_keys()])
    mine = {key: target[key].site for key in target.float_keys()}
    right = common_path([site for key, site in mine.items() if not (keep and is_named(keep, key, site))])
    if left != right and left.endswith(right):
        return left.removesuffix(right), ""
    if left != right and right.endswith(left):
        return "", right.removesuffix(left)
    return "", ""


def _without_prefix(schema: Schema, prefix: str) -> Schema:
    """The same keys, with a leading path taken off the sites of float entries and off hosts."""
    if not prefix:
        return schema
    entries = {key: entry._replace(site=entry.site.removeprefix(prefix)) for key, entry in schema.items()}
    fused = tuple(replace(one, host=one.host.removeprefix(prefix)) for one in schema.fused)
    return replace(schema, entries=entries, fused=fused)


class _Matcher:
    """The two sides while they are being paired: `free` source keys, `wanted` target keys, both in order.

    `cut` are the leading paths that the sites of the two sides have lost.
    """

    def __init__(self, source: Schema, target: Schema, rename: Rename, cut: tuple[str, str]) -> None:
        self.source = source
        self.target = target
        self.cut = cut
        # normalizations that fusion renamed have no name of their own until `by_fusion` finds it
        self.fused = tuple(
            {one.prefix.removeprefix(path) for one in schema.fused}
            for schema, path in zip((source, target), cut, strict=True)
        )
        self.found = Match(rename=rename, prefix=cut[0], target_prefix=cut[1])
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
        return self.source[key].site if name == key else name.removeprefix(self.cut[0])

    def _is_fused(self, side: int, site: str) -> bool:
        return split_path(site)[0] in self.fused[side]

    def by_key(self) -> None:
        """A name that matches exactly is never renamed."""
        by_name = {name.removeprefix(self.cut[0]): key for key, name in self.names.items()}
        alike = "wrapper prefix" if any(self.cut) else "exact key"
        for key in list(self.wanted):
            origin = by_name.get(key.removeprefix(self.cut[1]))
            if origin is not None and origin in self.free:
                self._take(key, origin, alike if self.names[origin] == origin else "rename=")

    def by_form(self, form_of: Callable[[str], str], witness: str) -> None:
        """Pair what is left by a normal form of the site, where exactly one key on each side has it."""
        left: dict[tuple[bool, str], list[str]] = {}
        for key in self.free:
            site = self._source_site(key)
            left.setdefault((self._is_fused(0, site), form_of(site)), []).append(key)
        right: dict[tuple[bool, str], list[str]] = {}
        for key in self.wanted:
            site = self.target[key].site
            right.setdefault((self._is_fused(1, site), form_of(site)), []).append(key)
        for form, keys in right.items():
            origins = left.get(form, [])
            if len(origins) == 1 and len(keys) == 1:
                self._take(keys[0], origins[0], witness)
                continue
            for key in keys if origins else ():
                detail = f"could be {either(origins)}"
                if len(origins) == 1:
                    detail = f"{either(keys)} could all be {origins[0]}"
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
        # by site: the keys of a torch 1.x ConvBn are `conv.gamma`, not `conv.bn.weight`
        cut = self.cut[schema is self.target]
        own = {join_path(cut.removesuffix("."), schema[key].site): key for key in mine}
        groups = [one for one in schema.fused if any(join_path(one.prefix, name) in own for name in one.tensors)]
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
        around = {split_path(schema[key].site)[0] for key in schema.float_keys()}
        for prefix, (path, witness) in choose(groups, pool, modules, evidence, self.found, cut, around).items():
            self.found.norms[prefix] = (path, witness)
            for leaf, key in modules[path].items():
                mate = own.get(join_path(prefix, leaf))
                if mate is None:
                    continue
                if schema is self.target:
                    self._take(mate, key, witness)
                else:
                    self._take(key, mate, witness)

    def by_common_prefix(self) -> None:
        """Pair all names if taking one leading path off each side makes the two sides equal, name by name.

        Where some are paired already, what is left may be two things that have nothing to do with each other.
        """
        if self.found.pairs or not self.free or len(self.free) != len(self.wanted):
            return
        left = {self._source_site(key): key for key in self.free}
        right = {self.target[key].site: key for key in self.wanted}
        left_prefix, right_prefix = common_path(left), common_path(right)
        if left_prefix == right_prefix:
            return
        theirs = {(self._is_fused(0, name), name[len(left_prefix) :]): key for name, key in left.items()}
        pairs = {key: theirs.get((self._is_fused(1, name), name[len(right_prefix) :])) for name, key in right.items()}
        if any(o is None or self.source[o].shape != self.target[key].shape for key, o in pairs.items()):
            return
        for key, origin in pairs.items():
            assert origin is not None
            self._take(key, origin, "common prefix")
        # which normalization is which is settled with all else
        fused = {one.prefix for one in (*self.source.fused, *self.target.fused)}
        self.found.problems = [problem for problem in self.found.problems if problem.key not in fused]
        self.found.options.clear()
        self.found.contested.clear()
        # what is left of the two when the path that both have is taken off: quantizers are under it, too
        if left_prefix.endswith(right_prefix):
            left_prefix, right_prefix = left_prefix.removesuffix(right_prefix), ""
        elif right_prefix.endswith(left_prefix):
            left_prefix, right_prefix = "", right_prefix.removesuffix(left_prefix)
        self.found.prefix, self.found.target_prefix = self.cut[0] + left_prefix, self.cut[1] + right_prefix
