"""An LLM behind an OpenAI-compatible endpoint, asked for one chat completion at a time."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai

from cappy.errors import ConfigError, GeneratorError
from cappy.records import Candidate
from cappy.sampling.strategies import Decoding
from cappy.specs import Spec

KEY_VARIABLE = "OPENAI_API_KEY"
CONCURRENCY = 8
RETRIES = 5


class Endpoint:
    """Samples by chat completions; one request per candidate, since many endpoints refuse `n`.

    The key comes from the environment (OPENAI_API_KEY) and stands in no setting, record or log. The client retries
    what may pass (429 with Retry-After, 5xx, lost connections); what does not pass is a GeneratorError, and the parts
    finished before it are kept.
    """

    def __init__(self, spec: Spec, client: openai.OpenAI | None = None) -> None:
        self.name = spec.text
        self.revision = spec.name
        self._model = spec.name
        self._client = client or openai.OpenAI(
            base_url=spec.url, api_key=os.environ.get(KEY_VARIABLE, "none"), max_retries=RETRIES
        )

    def sample(self, instructions: Sequence[str], decoding: Decoding, *, seed: int) -> list[list[Candidate]]:
        """`decoding.num_samples` candidates per instruction, in order; likelihoods where the endpoint gives them."""
        if decoding.num_beams > 1 or decoding.top_k:
            raise ConfigError(f"{self.name}: an endpoint cannot do {decoding.name}; choose --strategy endpoint8")
        calls = [(instruction, seed + number) for instruction in instructions for number in range(decoding.num_samples)]
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            candidates = list(pool.map(lambda call: self._ask(call[0], decoding, call[1]), calls))
        return [candidates[i : i + decoding.num_samples] for i in range(0, len(candidates), decoding.num_samples)]

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> None:
        """None: chat endpoints do not tell how likely a given response is."""

    def _ask(self, instruction: str, decoding: Decoding, seed: int) -> Candidate:
        try:
            completion = self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": instruction}],
                max_tokens=decoding.max_new_tokens,
                temperature=decoding.temperature if decoding.do_sample else 0.0,
                top_p=decoding.top_p,
                seed=seed,
            )
        except openai.OpenAIError as error:
            reason = str(error).splitlines()[0][:200]
            raise GeneratorError(
                f"{self.name}: {type(error).__name__}: {reason}; check the endpoint and {KEY_VARIABLE}, then run the "
                "same command again: finished parts are kept"
            ) from error
        choice = completion.choices[0]
        text = (choice.message.content or "").strip()
        refused = bool(getattr(choice.message, "refusal", None))
        return Candidate(
            response=text,
            generator=self.name,
            revision=completion.model or self._model,
            decoding=decoding.name,
            seed=seed,
            status="refused" if refused else "ok" if text else "empty",
            **_likelihood(choice),
        )


def _likelihood(choice: Any) -> dict[str, Any]:
    tokens = choice.logprobs.content if choice.logprobs and choice.logprobs.content else None
    if not tokens:
        return {}
    total = sum(token.logprob for token in tokens)
    return {"logprob_sum": total, "logprob_mean": total / len(tokens), "num_tokens": len(tokens)}
