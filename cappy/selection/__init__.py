"""Selection: rules that pick one response of several.

All selectors are in `cappy.selection.selectors.SELECTORS`. To add one, add an entry there and a test.
"""
