"""On a CUDA GPU: bf16 without padding gives the scores of fp32 on the CPU, near enough, in any company."""

from pathlib import Path

import pytest
import torch

from cappy.scoring import Scorer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
PAIRS = [("where is the cat " * n, "on the mat " * (1 + n % 3)) for n in range(1, 8)]


def test_a_gpu_scores_as_a_cpu_does(scorer_folder: Path) -> None:
    exact = Scorer.load(str(scorer_folder), device="cpu", precision="fp32").score(PAIRS)
    assert Scorer.load(str(scorer_folder), device="cuda", precision="fp32").score(PAIRS) == pytest.approx(
        exact, abs=1e-4
    )
    low = Scorer.load(str(scorer_folder), device="cuda")
    assert low.precision == "bf16"
    result = low.score(PAIRS)
    assert result == pytest.approx(exact, abs=0.05), "the weights of this scorer are large, and so is what bf16 loses"
    assert [low.score([pair])[0] for pair in PAIRS] == pytest.approx(result, abs=5e-3)
