"""Writes ``timm_train_options.json``: what timm's train.py lets a YAML file set, and how.

    python tests/with_timm/timm_train_options.py CLONE v1.0.24 v1.0.28

CLONE is a clone of timm, the others are tags of it. Options are read off the ``add_argument`` calls
of ``train.py``; kept are those that all tags have alike.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")


def options(source: str) -> dict[str, dict]:
    """Type, number of values and choices of every option of a ``train.py``, by destination."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            flags = [arg.value for arg in node.args]
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            found[_destination(flags, given)] = {
                "type": _type(given),
                "nargs": _literal(given.get("nargs")),
                "choices": _literal(given.get("choices")),
            }
    return found


def _destination(flags: list[str], given: dict[str, ast.expr]) -> str:
    long = next((flag for flag in flags if flag.startswith("--")), flags[0])
    return _literal(given.get("dest")) or long.lstrip("-").replace("-", "_")


def _type(given: dict[str, ast.expr]) -> str:
    action = given.get("action")
    if isinstance(action, ast.Constant):
        return "flag"  # store_true and its like
    if action is not None:
        return "mapping"  # timm's ParseKwargs
    return given["type"].id if "type" in given else "str"


def _literal(node: ast.expr | None):
    return None if node is None else json.loads(json.dumps(ast.literal_eval(node)))


def main(clone: str, *tags: str) -> None:
    """Write the file from the given tags of a clone."""
    versions = [
        options(subprocess.check_output(["git", "-C", clone, "show", f"{tag}:train.py"], text=True))
        for tag in tags
    ]
    first, *others = versions
    alike = {k: v for k, v in sorted(first.items()) if all(o.get(k) == v for o in others)}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in alike.items())
    FILE.write_text(f'{{\n "timm": {json.dumps(tags)},\n "options": {{\n{lines}\n }}\n}}\n')


if __name__ == "__main__":
    main(*sys.argv[1:])
