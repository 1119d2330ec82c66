"""Selection: the rules that pick one response of several; evaluation, the gate and what picks for users read one list.

`cappy.selection.selectors.SELECTORS` has them all. To add one: an entry there, and a test.
"""
