"""A1: a scorer that comes from the registry has the number that it had before it went there."""

from typing import Any

import pytest
from other_loaders import PAIRS, by_cross_encoder, by_transformers

from cappy.registry import download
from cappy.scoring import Scorer


def test_a1_a_downloaded_scorer_has_one_number_everywhere(env: Any) -> None:
    folder = env.folder / "scorer"
    scorer = Scorer.load("builtin:tiny", device="cpu", precision="fp32")
    scorer.save(folder)
    env.register(folder, env.report("report", folder))
    env.promote(env.folder / "report")
    kept = download("models:/cappy@champion", tracking_uri=env.uri, cache=env.folder / "cache")
    expected = scorer.score(PAIRS)
    assert Scorer.load(str(kept), device="cpu", precision="fp32").score(PAIRS) == pytest.approx(expected, abs=1e-6)
    assert by_transformers(kept) == pytest.approx(expected, abs=1e-4)
    assert by_cross_encoder(kept) == pytest.approx(expected, abs=1e-4)
