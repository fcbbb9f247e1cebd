"""Recipes: the settings of a model under a name, from scripts/recipes.txt, whose first lines explain its form."""

import textwrap
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

from common import UserError
from config_check import nearest, shown

__all__ = ["RECIPES", "Recipe", "Section", "listing", "read_recipes", "recipe_settings"]

RECIPES = Path(__file__).resolve().parent / "scripts" / "recipes.txt"


class Recipe(NamedTuple):
    """One line of scripts/recipes.txt with the facts above it."""

    name: str
    settings: list[str]
    score: str  # published AP, "box / mask"
    parameters: str  # millions
    gflops: str
    compared: str
    model: str  # the published file's name


class Section(NamedTuple):
    title: str
    text: list[str]
    recipes: list[Recipe]


def read_recipes(text: str) -> list[Section]:
    """The sections of a recipes file. A recipe without a line of facts, or with a repeated name, is an error."""
    sections: list[Section] = []
    facts = None
    names = set()
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("## "):
            sections.append(Section(line[3:], [], []))
        elif line.startswith("#: "):
            facts = ["" if part.strip() == "-" else part.strip() for part in line[3:].split("|")]
        elif line.startswith("#"):
            if sections:
                sections[-1].text.append(line[1:].strip())
        elif line.strip():
            name, *settings = line.split()
            if not sections or facts is None or len(facts) != 5 or name in names:
                raise UserError(f"recipes, line {number}: {name} needs a new name and five facts in the line before it")
            sections[-1].recipes.append(Recipe(name, settings, *facts))
            names.add(name)
            facts = None
    return sections


def recipe_settings(name: str) -> list[str]:
    """The KEY=VAL settings of a recipe. Its schedule is COCO's: on smaller data sets it gives way to one that fits."""
    known = {r.name: r.settings for section in read_recipes(RECIPES.read_text()) for r in section.recipes}
    if name not in known:
        near = nearest(name, known, count=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "--recipe list shows all of them"
        raise UserError(f"--recipe {shown(name)[1:-1]}: there is no such recipe; {hint}")
    return [word.replace("TRAIN.LR_SCHEDULE=", "TRAIN.LR_SCHEDULE=auto:") for word in known[name]]


def listing() -> str:
    """A table of all recipes, section by section."""
    parts = []
    for section in read_recipes(RECIPES.read_text()):
        rows = [
            [r.name, r.score, r.parameters, r.gflops, textwrap.fill(" ".join(r.settings), 80, break_on_hyphens=False)]
            for r in section.recipes
        ]
        headers = ["name", "published AP", "parameters (M)", "GFLOPs", "settings"]
        parts.append(f"{section.title}\n{tabulate(rows, headers, 'simple', disable_numparse=True)}")
    return "\n\n".join(parts)
