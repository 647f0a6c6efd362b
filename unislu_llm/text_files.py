"""Text that people write and pass on: read within bounds, also where it means harm."""

from __future__ import annotations

import os
from typing import Any

import yaml

from unislu_llm.errors import UserError

_MOST_BYTES = 1 << 28  # read as one text; results and tokenizers stay far below
_MOST_YAML = 1 << 18  # bytes; the parser takes seconds for that, at worst
_MOST_NODES = 1 << 18  # of YAML with its aliases written out


def read_text(path: str | os.PathLike[str], most: int = _MOST_BYTES) -> str:
    """A UTF-8 file of `most` bytes; raises UserError: it is none, longer, or cannot be read."""
    try:
        # Before it is opened: a pipe would be waited for.
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path} cannot be read: it is no file")
        with open(path, "rb") as file:
            # No more than there is: `read` takes the memory of all that it is asked for.
            data = file.read(min(most, os.fstat(file.fileno()).st_size) + 1)
        if len(data) > most:
            raise UserError(f"{path} cannot be read: it has over {most >> 10:,} KB")
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be read: {why}") from error


def read_yaml(path: str | os.PathLike[str], loader: type[yaml.SafeLoader] = yaml.SafeLoader,
              ) -> tuple[yaml.Node | None, Any]:
    """What a YAML file says, and the nodes that it was made from, which know their lines. Raises
    UserError: it cannot be read, is no YAML (with its line), or means too much."""
    text = read_text(path, _MOST_YAML)
    try:
        parser = loader(text)
        node = parser.get_single_node()
        if node is not None and _size(node, {}) > _MOST_NODES:
            raise ValueError("its aliases (*name) stand for too much; write out what they mean")
        return node, None if node is None else parser.construct_document(node)
    except (ValueError, yaml.YAMLError, RecursionError, AttributeError, LookupError, TypeError,
            ArithmeticError) as error:  # the last ones: of `!!timestamp` and others, on odd text
        mark, problem = (getattr(error, name, None) for name in ("problem_mark", "problem"))
        place = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{place}: not valid YAML: {problem or error}") from error


def _size(node: yaml.Node, sizes: dict[yaml.Node, int]) -> int:
    """Nodes of a tree in which what several aliases name counts each time."""
    if node not in sizes:
        sizes[node] = _MOST_NODES  # what holds itself has no end
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        sizes[node] = 1 + sum(_size(n, sizes) for part in parts
                              for n in (part if isinstance(part, tuple) else (part,)))
    return sizes[node]
