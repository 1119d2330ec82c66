"""A gateway that speaks OpenAI's chat completions: n samples of an LLM, the best of them by a scorer."""
