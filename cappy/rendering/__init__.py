"""Renders untrusted Jinja templates in child processes with limits on memory and CPU time.

`jobs` runs jobs and returns their outcomes in order; `process` is the parent's side of a child process; `child` runs
in the child and imports little more than Jinja; `promptsource` implements PromptSource templates. The package imports
only `errors` from the rest of Cappy.
"""

MAX_MEMORY = 2**29
"""Memory limit of a child in bytes, on top of its memory at start."""
MAX_ANSWER = 2**23
"""Maximum size of one answer in bytes."""
OUT_OF_MEMORY = 3
"""Exit code of a child that runs out of memory."""
