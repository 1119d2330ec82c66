"""Untrusted Jinja templates, rendered in child processes with a limit on memory and CPU time.

`render` takes jobs and gives outcomes in order; `child` is what runs in the child, which imports Jinja and little else.
`promptsource` and `chat` say what a template of their kind is. Nothing here imports the rest of Cappy but `errors`.
"""
