"""Untrusted Jinja templates, rendered in child processes with a limit on memory and CPU time.

`jobs` takes jobs and gives outcomes in order; `process` is a child as its parent sees it; `child` is what runs in it,
which imports Jinja and little else; `promptsource` says what a template of that kind is. Nothing here imports the rest
of Cappy but `errors`.
"""

MAX_MEMORY = 2**29
"""Bytes above what the child has when it is ready."""
MAX_ANSWER = 2**23
"""Bytes of one answer."""
OUT_OF_MEMORY = 3
"""How a child exits whose memory runs out."""
