"""A gateway with OpenAI's chat completions API: samples an LLM n times and returns the sample with the best score."""
