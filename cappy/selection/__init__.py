"""Selection: the rules that pick one response of several; evaluation, report and gate read one list.

`cappy.selection.selectors.SELECTORS` has them all. To add one: an entry there, and a test.
"""
