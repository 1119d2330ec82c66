"""A gateway with OpenAI's chat completions API: samples an LLM n times and returns the best sample by a scorer."""
