"""Renders untrusted Jinja templates in child processes with limits on memory and CPU time.

`jobs` runs jobs and returns their outcomes in order; `process` is the parent's side of a child process; `child` runs
in the child and imports little more than Jinja; `promptsource` implements PromptSource templates. From the rest of
Cappy only `errors` is imported.
"""

MAX_MEMORY = 2**29
"""Bytes, on top of the child's memory at start."""
MAX_ANSWER = 2**23
"""Bytes of one answer."""
OUT_OF_MEMORY = 3
"""Exit code of a child that runs out of memory."""
