"""Mixtures by name: which datasets, templates and splits they hold, and how many rows come of them.

    t0           what T0 was trained on, and Cappy after it: 38 subsets, 313 templates
    heldout      the eleven tasks that Cappy was evaluated on without training, COPA and HellaSwag
    bigbench45   the 45 generation tasks of BIG-bench that Cappy was adapted to

The facts lie in `data/`. `sources.json` is written by hand: where each subset lies at the Hugging Face hub today. The
hub could not be reached where it was written, so every entry says `verified: false` and what public text it rests on.
A `revision` is a branch, never a commit that nobody looked up: the manifest of the prepared data records the commit
that it resolved to. The other files are made of it, of PromptSource's templates and of two published tables:

    python -m cappy.preparation.mixtures --templates FOLDER --published FOLDER
"""

from cappy.preparation.mixtures.facts import NAMES, Mixture, Subset, TemplateFacts, load_mixture
from cappy.preparation.mixtures.plan import Plan, PlanRow, cap, plan
from cappy.preparation.mixtures.table import text, to_json

__all__ = [
    "NAMES",
    "Mixture",
    "Plan",
    "PlanRow",
    "Subset",
    "TemplateFacts",
    "cap",
    "load_mixture",
    "plan",
    "text",
    "to_json",
]
