"""What is mistyped on a command line or in its files, with the nearest names that there are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

# as jsonargparse says it: of a class, and of an argument on the command line or in a file
_CLASS = re.compile(r"dot import path string: (\w+)$")
_ARGUMENT = re.compile(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'")


def with_nearest_names(message: str, classes: Iterable[str], arguments: Iterable[str]) -> str:
    """Return a message of the command line and, where a class or an argument is mistyped, the nearest names.

    Args:
        message: What jsonargparse says.
        classes: Names of the classes of lightning_prune.
        arguments: Names of the arguments, without dashes.
    """
    if found := _CLASS.search(message):
        nearest = get_close_matches(found[1], list(classes), n=3, cutoff=0.5)
        message += f"\nlightning_prune has no class {found[1]!r}."
    elif found := _ARGUMENT.search(message):
        # arguments of one part are alike, so that there is always a second one that is not meant
        nearest = get_close_matches(found[1] or found[2], sorted(arguments), n=1, cutoff=0.8)
        message += "." if nearest else ""
    else:
        return message
    return message + (f" Did you mean {' or '.join(nearest)}?" if nearest else "")
