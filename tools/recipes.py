#!/usr/bin/env python3
"""Writes the tables of docs/RECIPES.md from scripts/recipes.txt, whose first lines explain its form.

python tools/recipes.py
"""

import import_path

import sys
from pathlib import Path

from common import UserError, atomic_write, errors_in_one_line, logger
from config_recipes import RECIPES, Section, read_recipes

__all__ = ["page"]

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "RECIPES.md"
MODELS = "http://models.tensorpack.com/FasterRCNN/COCO-MaskRCNN-{}.npz"
START, END = "<!-- tables: written by tools/recipes.py -->\n", "<!-- end -->\n"


def tables(sections: list[Section]) -> str:
    """Markdown: a heading, its text and a table for each section."""
    parts = []
    for section in sections:
        published = any(r.score for r in section.recipes)
        linked = any(r.model for r in section.recipes)
        compared = any(r.compared for r in section.recipes)
        headers = ["name", "settings"]
        headers += ["box / mask AP"] * published + ["parameters (M)", "GFLOPs"]
        headers += ["compared"] * compared + ["model"] * linked
        rows = []
        for r in section.recipes:
            row = [f"`{r.name}`", f"`{' '.join(r.settings)}`"]
            row += (
                [r.score.replace(" / ", "&nbsp;/&nbsp;")] * published
                + [r.parameters, r.gflops]
                + [r.compared] * compared
            )
            row += [f"[{r.model}]({MODELS.format(r.model)})" if r.model else ""] * linked
            rows.append(row)
        lines = [headers, ["---"] * len(headers), *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append("\n".join([f"## {section.title}", *section.text, "", table]))
    return "\n\n".join(parts) + "\n"


def page(current: str, recipes: str) -> str:
    """The page `current` with its tables replaced by those of the text of a recipes file."""
    before, found, rest = current.partition(START)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise UserError(f"docs/RECIPES.md: the lines '{START.strip()}' and '{END.strip()}' are missing")
    return before + START + tables(read_recipes(recipes)) + END + after


@errors_in_one_line
def main() -> int:
    written = page(TARGET.read_text(), RECIPES.read_text())
    with atomic_write(TARGET) as f:
        f.write(written)
    logger.info(f"{TARGET} has the recipes of {RECIPES}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
