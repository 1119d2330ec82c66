"""Minimum Bayes risk: the response that is nearest to all others of its pool (Kumar and Byrne, 2004)."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


def mbr(responses: Sequence[str]) -> Vector:
    """Mean Rouge-L of each response against the others of the pool; a lone response has 0.

    Rounded, so that means that are equal but for the order of adding count as equal.
    """
    similarity = mutual_rouge_l(responses)
    sums = similarity.sum(axis=1) - similarity.diagonal()
    means: Vector = np.round(sums / max(1, len(responses) - 1), 12)
    return means


def mutual_rouge_l(responses: Sequence[str]) -> npt.NDArray[np.float64]:
    """Rouge-L F1 (stemmed) of every response against every other, shape (responses, responses), symmetric.

    It is 2c / (m + n) for a common subsequence of c tokens: `rouge_score`'s value up to its last bits.
    """
    # Imported here: whoever reads a report needs the names of the selectors, and neither of these two.
    from rapidfuzz import process
    from rapidfuzz.distance import LCSseq

    from cappy.annotation.rouge import token_strings

    tokens, _ = token_strings(responses)
    unique = {text: index for index, text in enumerate(dict.fromkeys(tokens))}
    texts = list(unique)
    common = process.cdist(texts, texts, scorer=LCSseq.similarity, dtype=np.int32)
    sizes = np.array([len(text) for text in texts])
    f_measure = 2.0 * common / np.maximum(sizes[:, None] + sizes[None, :], 1)
    where = [unique[text] for text in tokens]
    mutual: npt.NDArray[np.float64] = f_measure[np.ix_(where, where)]
    return mutual
