"""Settings for timm's ``train.py -c``: the paper's experiments and a fine-tuning run.

Each file says in its comments what the paper reported with it.
"""

from difflib import get_close_matches
from pathlib import Path

from ema_timm.errors import UserError

_FOLDER = Path(__file__).parent


def recipes() -> dict[str, str]:
    """What each recipe is for, by name, in one line."""
    return {path.stem: _first_line(path) for path in sorted(_FOLDER.glob("*.yaml"))}


def read(name: str) -> str:
    """The text of one recipe.

    Raises:
        UserError: If there is none of that name.
    """
    known = recipes()
    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0.3)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UserError(f"no recipe is named {name!r}. {hint}ema-timm recipes lists them.")
    return (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
