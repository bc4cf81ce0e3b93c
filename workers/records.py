"""Names within the records of a run that several rooms share. Importing this costs nothing."""

PARTS = ("data", "forward", "backward", "reduce", "update")
"""Parts of a step, which follow one another; a record has their times as ``data_seconds`` and so on."""

GATES = ("compressed", "selected", "window")
"""NSA's branches, in the order of a layer's gates."""
