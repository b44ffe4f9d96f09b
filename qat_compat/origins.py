"""Which quantizer of a source is which of a target: by what they quantize, then by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qat_compat.draft import Draft
from qat_compat.frameworks import Needs, Quantizer, same_flow
from qat_compat.names import canonical_path, canonical_site, is_positional, renamed_path, renamed_site
from qat_compat.norms import Match
from qat_compat.schema import Role, Schema, Spec
from qat_compat.state import split_path

__all__ = ["Origin", "find_origins", "key_of", "spec_of"]


@dataclass(frozen=True)
class Origin:
    """The source's state of one quantizer.

    Args:
        name: The quantizer's name there.
        leaves: leaf -> source key.
    """

    name: str
    leaves: Mapping[str, str]


def find_origins(draft: Draft, quantizers: Sequence[Quantizer], match: Match) -> list[tuple[Quantizer, Origin | None]]:
    """Each quantizer of the target with the source's state of it: by site, then by name.

    Names that number quantizers mean something in one graph only, and sites of outputs only where a system that knew
    them wrote them down; the site of a weight, or of an input, is its module's name in every framework.
    """
    found: dict[str, Origin] = {}
    by_site: dict[str, list[str]] = {}
    for name, keys in draft.source.by_quantizer().items():
        found[name] = Origin(name, {draft.source[key].leaf: key for key in keys})
        site = renamed_site(draft.source[keys[0]].site, match.rename)
        by_site.setdefault(canonical_site(site, match.prefix), []).append(name)
    exact = {renamed_path(name, match.rename).removeprefix(match.prefix): name for name in found}
    forms = Counter(map(canonical_path, exact))
    plain = {form: name for path, name in exact.items() if forms[form := canonical_path(path)] == 1}
    numbered = {name for name in plain if is_positional(name)}
    wanted = {canonical_path(n.removeprefix(match.target_prefix)) for q in quantizers for n in q.names}
    same = same_flow(draft.source, draft.target)
    firsts = {canonical_path(q.name.removeprefix(match.target_prefix)) for q in quantizers}
    # what this package writes has a quantizer of several names under its first one
    graphs = [wanted, firsts] if draft.source.recorded else [wanted]
    same_graph = same and numbered in [{name for name in names if is_positional(name)} for names in graphs]
    sites = Counter(canonical_site(quantizer.site, match.target_prefix) for quantizer in quantizers)
    shared = Counter(
        form for q in quantizers for form in {canonical_path(n.removeprefix(match.target_prefix)) for n in q.names}
    )
    hosts = _Hosts(draft, match)
    by_number, weights_too = 0, False
    chosen: list[tuple[Quantizer, Origin | None]] = []
    for quantizer in quantizers:
        site = canonical_site(quantizer.site, match.target_prefix)
        by_module = quantizer.needs is Needs.WEIGHTS or site.startswith("input:")
        known = draft.source.recorded or (by_module and not same)
        known &= same or not site.startswith("node:")
        at_site = [name for name in by_site.get(site, []) if hosts.agree(quantizer, found[name])] if known else []
        if len(at_site) == 1 and sites[site] == 1:
            chosen.append((quantizer, found[at_site[0]]))
            continue
        origin: str | None = None
        for name in quantizer.names if same or not draft.source.recorded else ():
            path = name.removeprefix(match.target_prefix)
            form = canonical_path(path)
            if same_graph or not is_positional(form):
                origin = exact.get(path)
                if origin is None and (namesake := plain.get(form)) is not None and shared[form] == 1:
                    origin = namesake if hosts.agree(quantizer, found[namesake]) else None
            if origin is not None:
                break
        if origin is not None and is_positional(canonical_path(quantizer.name)):
            by_number += 1
            weights_too |= quantizer.needs is Needs.WEIGHTS
        chosen.append((quantizer, found[origin] if origin is not None else None))
    if weights_too:  # a number that is off by one gives a weight another's range
        draft.warnings.append(
            f"{by_number} quantizers are matched by their number, which exporters of other versions may give otherwise;"
            " files that save_checkpoint writes say what each one quantizes"
        )
    return chosen


class _Hosts:
    """Which modules of the source the float tensors of each module of the target come from.

    Names without wrapper segments are not enough: a part of a model may have a wrapper's name.
    """

    def __init__(self, draft: Draft, match: Match) -> None:
        self._source = draft.source
        self._holding = {path for key in draft.source.float_keys() for path in _paths(draft.source, key)}
        self._paired: dict[str, set[str]] = {}
        self._same: set[str] = set()  # modules that have one path on both sides, and those around them
        for key, (origin, _) in match.pairs.items():
            mine, theirs = _paths(draft.target, key), _paths(draft.source, origin)
            for path in mine:
                self._paired.setdefault(path, set()).update(theirs)
            path = mine[0] if mine[0] == theirs[0] else ""
            while path and path not in self._same:
                self._same.add(path)
                path = split_path(path)[0]

    def agree(self, quantizer: Quantizer, origin: Origin) -> bool:
        """Whether the source's state can be that of the quantizer's own module, by all that is paired."""
        mine, theirs = _host(quantizer.site), _host(self._source[next(iter(origin.leaves.values()))].site)
        if (paired := self._paired.get(mine)) is not None:
            return theirs in paired or theirs not in self._holding
        alike = canonical_path(mine) == canonical_path(theirs)
        return not alike or not (self._stands_apart(mine, theirs) or self._stands_apart(theirs, mine))

    def _stands_apart(self, path: str, other: str) -> bool:
        """Whether `path` is in a part that both sides have, and `other` is not in it."""
        part = split_path(path)[0]
        return part in self._same and not other.startswith(f"{part}.")


def _paths(schema: Schema, key: str) -> tuple[str, str]:
    """The module of a float tensor, in the float model's words and in its own."""
    return split_path(schema[key].site)[0], split_path(key)[0]


def _host(site: str) -> str:
    return site.partition(":")[2].partition("+")[0]


def key_of(draft: Draft, origin: Origin, role: Role) -> str | None:
    """The source's only tensor of a role in a quantizer; what is computed goes before what it is computed from."""
    keys = [key for key in origin.leaves.values() if draft.source[key].role is role]
    computed = [key for key in keys if key in draft.source.recipes]
    return (computed or keys)[0] if len(computed or keys) == 1 else None


def spec_of(draft: Draft, origin: Origin, role: Role) -> Spec | None:
    key = key_of(draft, origin, role)
    return None if key is None else draft.source[key].spec
