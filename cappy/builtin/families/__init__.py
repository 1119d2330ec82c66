"""The families of procedural tasks, a module for each theme; `FAMILIES` in each."""
