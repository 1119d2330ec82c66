"""Selection: rules that pick one of several responses.

All selectors are in `cappy.selection.selectors.SELECTORS`. To add one, add an entry there and a test.
"""
