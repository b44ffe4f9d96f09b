"""Names as text: wrapper segments, the user's renames, naming conventions. Nothing here looks at a tensor's shape."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from qat_compat.errors import PlanError, Problem, ProblemKind
from qat_compat.state import join_path, split_path

__all__ = [
    "WRAPPERS",
    "Rename",
    "by_form",
    "canonical",
    "canonical_path",
    "canonical_site",
    "common_path",
    "conventional",
    "either",
    "idle_patterns",
    "is_named",
    "is_positional",
    "renamed",
    "skeletons",
]

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
# the same of lists of them, which go by their index: `convs.0`/`bns.0`, `layers.0`/`norms.0`
_LISTS = re.compile(
    r"_?(?:convolutions|convs|linears|lins|fcs|layers|batch_?norms|normalizations|norms|bns)(?![a-z])_?"
)


def canonical(name: str) -> str:
    """A name without wrapper segments.

    Example:
        >>> canonical("module._orig_mod.model.conv.weight"), canonical("my_module.w")
        ('conv.weight', 'my_module.w')
    """
    parts = name.split(".")
    kept = [part for part in parts[:-1] if part not in WRAPPERS]
    return ".".join([*kept, parts[-1]])


def by_form(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by what they are without wrapper segments.

    Example:
        >>> by_form(["fc.weight", "model.fc.weight"])
        {'fc.weight': ['fc.weight', 'model.fc.weight']}
    """
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(canonical(name), []).append(name)
    return found


def canonical_path(path: str) -> str:
    """A module path without wrapper segments.

    Example:
        >>> canonical_path("module.body.module")
        'body'
    """
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def canonical_site(site: str, prefix: str = "") -> str:
    """The site of a quantizer without wrapper segments and without a leading path.

    Example:
        >>> canonical_site("output:module.conv+relu"), canonical_site("weight:net.fc", "net.")
        ('output:conv+relu', 'weight:fc')
    """
    kind, _, path = site.partition(":")
    host, plus, after = path.removeprefix(prefix).partition("+")
    return f"{kind}:{canonical_path(host)}{plus}{after}"


def is_named(globs: Iterable[str], *names: str) -> bool:
    """Whether a glob fits one of the names, or is one: names may hold what means something else in a glob.

    Example:
        >>> is_named(["fc.*"], "fc.weight"), is_named(["[CLS].weight"], "[CLS].weight")
        (True, True)
    """
    return any(name == glob or fnmatchcase(name, glob) for glob in globs for name in names)


def is_positional(quantizer: str) -> bool:
    """Whether a quantizer is named by its position in a graph, which means nothing in another graph.

    Example:
        >>> is_positional("activation_post_process_7"), is_positional("conv.activation_post_process")
        (True, False)
    """
    return split_path(quantizer)[1].startswith("activation_post_process_")


def renamed(name: str, rename: Rename) -> str:
    """Apply ordered (pattern, replacement) pairs to a source key."""
    for pattern, replacement in rename:
        try:
            name = re.sub(pattern, replacement, name)
        except re.error as error:
            problem = Problem(ProblemKind.INVALID, pattern, f"rename pattern or replacement is not valid: {error}")
            raise PlanError([problem]) from error
    return name


def idle_patterns(names: Iterable[str], rename: Rename) -> list[str]:
    """The patterns that match no name, each seen as the pairs before have left it.

    Example:
        >>> idle_patterns(["net.fc.weight"], [(r"^net\\.", ""), (r"^fc\\.", "head."), (r"^net", "")])
        ['^net']
    """
    idle = dict.fromkeys(range(len(rename)))
    for name in names if rename else ():
        for number, pair in enumerate(rename):
            if number in idle and re.search(pair[0], name):
                del idle[number]
            name = renamed(name, (pair,))
    return [rename[number][0] for number in idle]


def renamed_path(path: str, rename: Rename) -> str:
    """The path of a module as the user's `rename` has it, which speaks of the keys below it.

    Example:
        >>> renamed_path("net.fc", [(r"^net\\.", ""), (r"fc\\.", "head.")])
        'head'
    """
    return renamed(f"{path}.", rename).removesuffix(".") if path and rename else path


def renamed_site(site: str, rename: Rename) -> str:
    """The site of a quantizer as the user's `rename` has it.

    Example:
        >>> renamed_site("output:net.conv+relu", [(r"^net\\.", "")])
        'output:conv+relu'
    """
    kind, _, path = site.partition(":")
    host, plus, after = path.partition("+")
    return f"{kind}:{renamed_path(host, rename)}{plus}{after}"


def skeletons(path: str) -> set[str]:
    """What is left of the name of a normalization without the words of a convention.

    Example:
        >>> sorted(skeletons("stage.bn1")), sorted(skeletons("stage.bns.1"))
        (['stage.1'], ['stage.*.1', 'stage.bns.1'])
    """
    return {_skeleton(path)} | _in_list(path)


def conventional(host: str) -> set[str]:
    """Skeletons of the names that a normalization after `host` has by convention.

    Example:
        >>> sorted(conventional("stage.conv1")), sorted(conventional("stage.convs.1"))
        (['stage.1'], ['stage.*.1', 'stage.convs.2'])
    """
    parent, leaf = split_path(host)
    after = join_path(parent, str(int(leaf) + 1)) if leaf.isdigit() else host
    return {_skeleton(after)} | _in_list(host)


def _skeleton(path: str) -> str:
    return ".".join(_CONVENTION.sub("", part) for part in canonical_path(path.lower()).split("."))


def _in_list(path: str) -> set[str]:
    """The skeleton of a member of a list that is named after what is in it."""
    parent, leaf = split_path(canonical_path(path.lower()))
    around, name = split_path(parent)
    return {join_path(around, _LISTS.sub("*", name), leaf)} if leaf.isdigit() and _LISTS.search(name) else set()


def common_path(names: Iterable[str]) -> str:
    """The longest leading path, with its dot, that all names share."""
    listed = [name.split(".")[:-1] for name in names]
    if not listed:
        return ""
    shortest, longest = min(listed), max(listed)
    length = 0
    while length < min(len(shortest), len(longest)) and shortest[length] == longest[length]:
        length += 1
    return ".".join(shortest[:length]) + "." if length else ""


def either(names: Iterable[str]) -> str:
    return " or ".join(names)
