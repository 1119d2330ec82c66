"""Known numbers on 630 real instances with 56 systems each."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from cappy.annotation import rouge_l
from cappy.evaluation import evaluate
from cappy.records import Candidate, Instance
from cappy.selection.pools import choose_system, collect_pools, system_index

POOL = Path(__file__).parents[2].parent / "shared/data/candidates/e2e_nlg.jsonl.gz"


@pytest.mark.skipif(not POOL.exists(), reason="the real pool of E2E responses is not beside the project")
def test_the_baselines_of_the_e2e_pool_are_the_known_ones() -> None:
    with gzip.open(POOL, "rt") as file:
        instances = [_instance(json.loads(line)) for line in file]
    pools = collect_pools(instances, metric="rougeL", splits={"test"})
    best = choose_system(pools)
    assert best is not None
    picks = [pool.labels[system_index(pool, best) or 0] for pool in pools]
    report = evaluate(instances, score=None)
    result = {name: round(100 * report.selectors[name].estimate.mean, 1) for name in ("random", "mbr", "oracle")}
    assert len(instances) == 630
    assert result == {"random": 65.1, "mbr": 71.0, "oracle": 84.4}
    assert round(100 * sum(picks) / len(picks), 1) == 70.8
    assert report.curve["mbr"][-1].mean == pytest.approx(report.selectors["mbr"].estimate.mean)


def _instance(row: dict[str, Any]) -> Instance:
    """The entries under "primary/" repeat systems that stand under "all/" too."""
    candidates = tuple(
        Candidate(
            response=given["text"],
            generator=given["system"],
            labels={"rougeL": rouge_l(row["references"], given["text"])},
        )
        for given in row["candidates"]
        if given["system"].startswith("all/")
    )
    return Instance(
        instance_id=row["id"],
        instruction=row["instruction"],
        references=tuple(row["references"]),
        split="test",
        candidates=candidates,
    )
